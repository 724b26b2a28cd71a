"""Build the wheel and import every module from it, away from the checkout.

A wheel that lacks a folder works from the checkout and nowhere else.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORT_ALL = """
import importlib, pkgutil, sys
import autointerp_dagster as package
assert package.__file__.startswith(sys.argv[1]), package.__file__
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(f"wheel: {len(names)} modules import")
"""


def main() -> None:
    """Exit with an error if the wheel does not build or a module does not import."""
    checkout = Path(__file__).resolve().parent.parent
    shutil.rmtree(checkout / "build", ignore_errors=True)  # may hold modules deleted since
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(checkout)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        site = str(Path(folder) / "site")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
        subprocess.run([*install, str(wheel)], check=True)
        environment = {"PYTHONPATH": site, "PATH": "/usr/bin:/bin", "HOME": folder}
        command = [sys.executable, "-P", "-c", IMPORT_ALL, site]
        subprocess.run(command, check=True, cwd=folder, env=environment)


if __name__ == "__main__":
    main()
