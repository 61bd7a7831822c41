"""Run notebooks from the first cell to the last, each in an empty folder, and store them with what their cells show.

python notebooks/execute.py               # all of them, minutes on two CPU cores
python notebooks/execute.py quickstart    # this one
"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(notebook: nbformat.NotebookNode, folder: Path, seconds: int, **environment: str) -> None:
    """Run all cells with this interpreter, in `folder`, and put what they show into the notebook."""
    # Without folders to search, "python3" is this interpreter, whatever kernels are installed on the machine.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=seconds,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    client.execute(env=os.environ | backend | environment, cleanup_kc=True)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave out what can only be seen in a browser beside the run, or speaks of this machine.

    That is: the state of widgets, which show progress; frames with a page of the run; warnings; and the plain text of
    what is shown as HTML.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_lasting(output)]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data.pop("text/plain", None)


def is_lasting(output: nbformat.NotebookNode) -> bool:
    """Whether an output says something where it is stored."""
    data = output.get("data", {})
    is_empty = "text/html" in data and not data.get("text/plain", "").strip()
    return not (is_empty or WIDGET in data or "<iframe" in data.get("text/html", "") or output.get("name") == "stderr")


def main() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="default: all")
    for name in parser.parse_args().names or names:
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder), seconds=3600)
        tidy(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
