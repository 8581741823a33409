"""Maps the side folders loaders/, kernels/ and configs/ into the package fastsimclr and compiles their C.

All else is in pyproject.toml. Without a C compiler it installs as well: torch then cuts the crops, simplejpeg decodes.
"""

from setuptools import Extension, find_packages, setup

SIDE = {"fastsimclr.loaders": "loaders", "fastsimclr.kernels": "kernels", "fastsimclr.configs": "configs"}
CUT = Extension(
    "fastsimclr.loaders._cut", ["loaders/cut.c", "loaders/jpeg.c"], extra_compile_args=["-O3"], optional=True
)
setup(
    package_dir=SIDE,
    ext_modules=[CUT],
    packages=sorted(
        set(find_packages(include=["fastsimclr", "fastsimclr.*"]))
        | {f"{package}.{sub}" for package, folder in SIDE.items() for sub in find_packages(folder)}
        | SIDE.keys()
    ),
    package_data={"": ["py.typed"], "fastsimclr.configs": ["*.yaml"]},
    include_package_data=False,
)
