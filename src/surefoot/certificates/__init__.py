"""From a network and data to a certificate: a proof that an exact global minimum lies nearby."""

from surefoot.certificates.certificate import Certificate
from surefoot.certificates.certify import certify
from surefoot.certificates.layers import NoRule

__all__ = ["Certificate", "NoRule", "certify"]
