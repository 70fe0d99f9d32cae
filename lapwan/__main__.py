"""`python -m lapwan`, the form that `accelerate launch -m lapwan ...` needs."""

from lapwan.cli import main

if __name__ == "__main__":
    main()
