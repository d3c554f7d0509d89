"""vLLM's own load generator as a command, to be run by the interpreter of vLLM's venv.

`vllm bench serve` is this, but the `vllm` command of the CPU build does not start.
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())
