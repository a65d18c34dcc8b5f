"""`python -m lit_sft` and `lit-sft`: first the signals, then what takes seconds to import."""

import sys

from lit_sft import signals
from lit_sft.cli import front_door, streams


def main() -> None:
    """Runs the command line."""
    signals.install()
    streams.set_up(sys.argv[1:])
    code = front_door.answer(sys.argv[1:])
    if code is not None:
        sys.exit(code)
    from lit_sft.cli import main as main_module

    main_module.main()


if __name__ == "__main__":
    main()
