"""`python -m kernels.build`: what a machine needs before the kernels run. The torch kernels need nothing."""


def main() -> None:
    print("kernels: torch")


if __name__ == "__main__":
    main()
