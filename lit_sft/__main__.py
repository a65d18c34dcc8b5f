"""`python -m lit_sft`."""

from lit_sft.cli import main

if __name__ == "__main__":
    main()
