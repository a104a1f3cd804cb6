"""`python -m surefoot.check PATH [--audit]`."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from surefoot.check import verify


def main(argv: list[str] | None = None, prog: str = "python -m surefoot.check") -> int:
    """Check a certificate; return 0 if every claim holds, 1 if not, 2 if there is nothing to check."""
    parser = argparse.ArgumentParser(prog=prog, description="Check a certificate file.")
    parser.add_argument("path", type=Path, help="the certificate's folder")
    parser.add_argument("--audit", action="store_true", help="ball arithmetic besides (pip install 'surefoot[audit]')")
    args = parser.parse_args(argv)
    if not args.path.is_dir():
        print(f"{prog}: {str(args.path)!r} is no folder; give the folder of a certificate", file=sys.stderr)
        return 2
    if args.audit and find_spec("flint") is None:
        print(f"{prog}: --audit needs python-flint; pip install 'surefoot[audit]'", file=sys.stderr)
        return 2
    result = verify(args.path, audit=args.audit)
    print(result)
    return 0 if result else 1


if __name__ == "__main__":
    sys.exit(main())
