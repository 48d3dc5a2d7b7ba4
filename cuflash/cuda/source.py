"""One text per kernel: the generated configuration followed by the kernel's file with all its includes.

CuPy's disk cache keys on the text that it compiles and does not look into included files. With the includes flattened
an edited header is a different text, so the cache is right by construction; ``#line`` keeps compiler messages at their
file and line.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from cuflash.plan import KernelSpec

PACKAGE = Path(__file__).resolve().parents[1]

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
ONCE = re.compile(r"^\s*#\s*pragma\s+once\b")


def kernels_folder() -> Path:
    """Return the folder of kernel sources: inside an installed package, beside it in a checkout."""
    packaged = PACKAGE / "kernels_cu"
    return packaged if packaged.is_dir() else PACKAGE.parent / "kernels_cu"


def flatten(name: str, search_path: tuple[Path, ...]) -> str:
    """Return the text of ``name`` with every ``#include "..."`` replaced by the file's text.

    Parameters
    ----------
    name : str
        Path of the file relative to the search path, as an include directive writes it.
    search_path : tuple of Path
        Folders to look in, first match wins: a folder in front replaces single files of the next.
    """
    return "\n".join(_lines(name, tuple(search_path), included=set(), origin=""))


def _lines(name: str, search_path: tuple[Path, ...], included: set[Path], origin: str) -> list[str]:
    path = next((folder / name for folder in search_path if (folder / name).is_file()), None)
    if path is None:
        wanted_by = f" included by {origin}" if origin else ""
        raise FileNotFoundError(f"{name}{wanted_by} is in none of {', '.join(map(str, search_path))}")
    if path in included:
        return []
    # Relative to the search folder's name, so that the text does not depend on where the package is installed.
    label = f"{path.parents[len(Path(name).parents) - 1].name}/{name}"
    lines = [f'#line 1 "{label}"']
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if ONCE.match(line):
            included.add(path)
            lines.append("")
        elif include := INCLUDE.match(line):
            lines += _lines(include[1], search_path, included, origin=f"{label}:{number}")
            lines.append(f'#line {number + 1} "{label}"')
        else:
            lines.append(line)
    return lines


def prelude(spec: KernelSpec) -> str:
    """Return the ``struct Config`` that the kernel's compile-time choices come from.

    >>> from cuflash.plan import KernelSpec
    >>> config = (("Element", "class", "Float16"), ("head_dim", "int", 64), ("softcap", "bool", False))
    >>> print(prelude(KernelSpec("forward_sm80.cu", "forward_sm80", config, "sm_90")))
    struct Bfloat16;
    struct Float16;
    struct Config {
      using Element = Float16;
      static constexpr int head_dim = 64;
      static constexpr bool softcap = false;
    };
    """
    # An attribute of a kernel, which must not be there for clusters of one, can only be chosen by the preprocessor.
    sizes = [f"#define CLUSTER_SIZE {value}" for name, _, value in spec.config if name == "cluster_size"]
    config = ["struct Config {", *map(_member, spec.config), "};"]
    return "\n".join(["struct Bfloat16;", "struct Float16;", *config, *sizes])


def _member(field: tuple[str, str, object]) -> str:
    name, kind, value = field
    if kind == "class":
        return f"  using {name} = {value};"
    text = str(value).lower() if isinstance(value, bool) else value
    return f"  static constexpr {kind} {name} = {text};"


@functools.lru_cache(maxsize=256)
def _kernel_text(name: str) -> str:
    return flatten(name, (kernels_folder(),))


def translation_unit(spec: KernelSpec) -> str:
    """Return the complete text of a kernel, ready for NVRTC."""
    return f"{prelude(spec)}\n{_kernel_text(spec.source)}\n"
