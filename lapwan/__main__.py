"""`python -m lapwan`, as `accelerate launch -m lapwan ...` needs it."""

from lapwan.cli import main

if __name__ == "__main__":
    main()
