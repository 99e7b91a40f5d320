"""`python -m nmbench.cli`."""

from nmbench.cli.group import main

if __name__ == "__main__":
    main()
