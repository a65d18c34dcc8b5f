"""`python -m lit_sft` and `lit-sft`: first the signals, then what takes seconds to import."""

from lit_sft import interrupts


def main() -> None:
    """Runs the command line."""
    interrupts.install()
    from lit_sft import cli

    cli.main()


if __name__ == "__main__":
    main()
