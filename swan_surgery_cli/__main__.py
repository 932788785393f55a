"""`python -m swan_surgery_cli`, which is what `accelerate launch -m` and `torchrun -m` start."""

from swan_surgery_cli import main


if __name__ == "__main__":
    main()
