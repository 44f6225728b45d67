"""Is the aligned model better, by how much, and how sure are we?"""

from trimtab.callable import make_callable

make_callable(__name__, "trimtab.evaluate.call:evaluate")
