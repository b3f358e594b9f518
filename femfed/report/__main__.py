"""The runs of a sweep side by side: `python -m femfed.report outputs/DATE/TIME`.

`simulate.py -m` does this at its end; this is for runs that were added later.
"""

import sys
from pathlib import Path

from femfed import escape_unencodable
from femfed.report.comparison import compare


def main(arguments: list[str]) -> int:
    """Compare the runs below each folder; return the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    escape_unencodable()
    for folder in map(Path, arguments):
        written = compare(folder)
        if not written:
            print(
                f"error: {folder} holds no two finished runs; expected the folder of a sweep, "
                "outputs/DATE/TIME",
                file=sys.stderr,
            )
            return 2
        print(written[0].read_text(encoding="utf-8"))
        print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
