"""What a terminal need not show: bars of libraries that last a second, and warnings that ask a library's authors to
change something.

Only for the commands; whoever uses the classes in Python sees everything.
"""

from __future__ import annotations

import warnings


def quiet_libraries() -> None:
    """Turn off transformers' and datasets' progress bars, and notices of names that will be deprecated inside
    libraries.
    """
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for module in ("transformers", "peft", "accelerate", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
