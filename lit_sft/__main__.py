"""`python -m lit_sft` and `lit-sft`: first the signals, then what takes seconds to import."""

from lit_sft import signals


def main() -> None:
    """Runs the command line."""
    signals.install()
    from lit_sft.cli import main as main_module

    main_module.main()


if __name__ == "__main__":
    main()
