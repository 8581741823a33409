"""Maps the side folders loaders/, kernels/ and configs/ into the package fastsimclr; all else is in pyproject.toml."""

from setuptools import find_packages, setup

SIDE = {"fastsimclr.loaders": "loaders", "fastsimclr.kernels": "kernels", "fastsimclr.configs": "configs"}
setup(
    package_dir=SIDE,
    packages=sorted(
        set(find_packages(include=["fastsimclr", "fastsimclr.*"]))
        | {f"{package}.{sub}" for package, folder in SIDE.items() for sub in find_packages(folder)}
        | SIDE.keys()
    ),
    package_data={"": ["py.typed"], "fastsimclr.configs": ["*.yaml"]},
    include_package_data=False,
)
