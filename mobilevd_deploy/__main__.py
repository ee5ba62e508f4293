"""`python -m mobilevd_deploy` is the command line too."""

from mobilevd_deploy.cli.main import main

if __name__ == "__main__":
    main()
