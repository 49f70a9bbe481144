"""`python -m em_interp.cli`, the same as `em-interp`."""

from em_interp.cli import main

if __name__ == "__main__":
    main()
