"""The C++ of this folder, augment.cc and jpeg.cc, that `make env` compiles."""
import ctypes
import os

from errors import UserError

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'build')


def load(name: str, **functions: list) -> ctypes.CDLL:
    """The library of <name>.cc; functions: the ctypes of each one's arguments."""
    try:
        library = ctypes.CDLL(os.path.join(FOLDER, name + '.so'))
        for function, types in functions.items():
            getattr(library, function).argtypes = types
    except (OSError, AttributeError) as error:
        raise UserError(f'{name}.cc is not built for this machine, run make env: {error}')
    return library
