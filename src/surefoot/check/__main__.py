"""`python -m surefoot.check PATH [--audit]`: exit code 0 if every claim holds, 1 if not, 2 if it made no sense."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from surefoot.check import verify
from surefoot.check.reading import FILES


def main(argv: list[str] | None = None, prog: str = "python -m surefoot.check") -> int:
    """Check a certificate, print the result and return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description="Check a certificate file.")
    parser.add_argument("path", type=Path, help="the certificate's folder")
    parser.add_argument("--audit", action="store_true", help="ball arithmetic besides (pip install 'surefoot[audit]')")
    args = parser.parse_args(argv)
    if not any((args.path / name).exists() for name in FILES):
        what = f"holds neither {' nor '.join(FILES)}" if args.path.is_dir() else "is no folder"
        problem = f"{str(args.path)!r} {what}; give the folder of a certificate, as `surefoot certify` writes it"
    elif args.audit and not find_spec("flint"):
        problem = "--audit needs python-flint; pip install 'surefoot[audit]'"
    else:
        result = verify(args.path, audit=args.audit)
        print(result)
        return 0 if result else 1
    print(f"{prog}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
