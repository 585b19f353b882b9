"""``python -m sdpipeline``."""

from sdpipeline.cli import main

if __name__ == "__main__":
    main()
