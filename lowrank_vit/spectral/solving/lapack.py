"""The few BLAS and LAPACK routines of a partial symmetric eigenproblem, called without holding Python's lock.

torch has no eigensolver for only some of the vectors. scipy's Python wrappers hold the lock for the whole call, which
would stop the training thread for tens of milliseconds at a time. scipy also exports the routines as C functions
(`scipy.linalg.cython_lapack`, `cython_blas`), and ctypes releases the lock while it calls one. Names and arguments are
LAPACK's: https://www.netlib.org/lapack/explore-html/. Arrays are float64 unless stated otherwise.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, Literal

import numpy as np


@cache
def _routine(library: str, name: str) -> Callable[..., Any]:
    """A routine as a function of references; raises `ImportError` where scipy does not export it."""
    from importlib import import_module

    module: ModuleType = import_module(f"scipy.linalg.{library}")
    capsule = module.__pyx_capi__[name]  # type: ignore[attr-defined]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = api.PyCapsule_GetName(capsule)
    address = api.PyCapsule_GetPointer(capsule, signature)
    num_arguments = signature.count(b",") + 1
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * num_arguments)(address)


def _call(library: str, name: str, *arguments: str | int | float | np.ndarray) -> int:
    """Call a routine by reference; returns its last argument where that is an integer (LAPACK's `info`)."""
    holders: list[Any] = []
    pointers: list[ctypes.c_void_p] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            pointers.append(ctypes.c_void_p(argument.ctypes.data))
            continue
        holder = (
            ctypes.c_char(argument.encode())
            if isinstance(argument, str)
            else (ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_double(argument))
        )
        holders.append(holder)
        pointers.append(ctypes.cast(ctypes.byref(holder), ctypes.c_void_p))
    _routine(library, name)(*pointers)
    return int(holders[-1].value) if isinstance(arguments[-1], int) else 0


def _lapack(name: str, *arguments: str | int | float | np.ndarray) -> None:
    """Call a LAPACK routine whose last argument is `info`. Raises `numpy.linalg.LinAlgError` where that is not 0."""
    info = _call("cython_lapack", name, *arguments, 0)
    if info != 0:
        raise np.linalg.LinAlgError(f"LAPACK's {name} returned info = {info}")


def gram(a_RC: np.ndarray) -> np.ndarray:
    """The lower triangle of A^T A (C <= R) or A A^T, (K, K) in Fortran order; the upper triangle is zero.

    `a_RC` is C-contiguous float64 or float32, and so is the result. A symmetric product (dsyrk, ssyrk) costs R*C*K
    operations, half of a general one.
    """
    rows, cols = a_RC.shape
    k, long = min(rows, cols), max(rows, cols)
    # Fortran reads the row-major (R, C) as a column-major (C, R): so "N" gives A^T A, and "T" A A^T.
    trans = "N" if cols <= rows else "T"
    result = np.zeros((k, k), a_RC.dtype, order="F")
    one, zero = np.ones(1, a_RC.dtype), np.zeros(1, a_RC.dtype)
    routine = "ssyrk" if a_RC.dtype == np.float32 else "dsyrk"
    _call("cython_blas", routine, "L", trans, k, long, one, a_RC, cols, zero, result, k)
    return result


def symmetric_times(lower_KK: np.ndarray, vector_K: np.ndarray) -> np.ndarray:
    """A symmetric matrix, given by its lower triangle, times a vector (ssymv); all float32, Fortran order."""
    k, one, zero = vector_K.size, np.ones(1, np.float32), np.zeros(1, np.float32)
    result = np.empty(k, np.float32)
    _call("cython_blas", "ssymv", "L", k, one, lower_KK, k, vector_K, 1, zero, result, 1)
    return result


def product_less(columns_KM: np.ndarray, lower_KK: np.ndarray) -> np.ndarray:
    """X X^T minus a symmetric matrix, in place of its lower triangle (ssyrk); all float32, Fortran order."""
    k, m = columns_KM.shape
    if m == 0:
        return np.negative(lower_KK, out=lower_KK)
    one, minus = np.ones(1, np.float32), -np.ones(1, np.float32)
    _call("cython_blas", "ssyrk", "L", "N", k, m, one, columns_KM, k, minus, lower_KK, k)
    return lower_KK


def cholesky_in_place(lower_KK: np.ndarray) -> bool:
    """R of R R^T in place of a matrix's lower triangle (spotrf), float32, Fortran order; False where there is none.

    About 1/3 K^3 operations.
    """
    k = lower_KK.shape[0]
    return _call("cython_lapack", "spotrf", "L", k, lower_KK, k, 0) == 0


def tridiagonalize(matrix_KK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q^T A Q = T of the lower triangle (dsytrd), in place: `matrix_KK` then holds Q's reflectors.

    Returns T's diagonal (K,), its subdiagonal (K-1,), and the reflectors' factors (K-1,). About 4/3 K^3 operations.
    """
    k = matrix_KK.shape[0]
    d, e, tau = np.empty(k), np.empty(k), np.empty(k)  # one longer than needed: no empty array for k = 1
    work = np.empty(64 * k)
    _lapack("dsytrd", "L", k, matrix_KK, k, d, e, tau, work, work.size)
    return d, e[: k - 1], tau[: k - 1]


def tridiagonal_values(d: np.ndarray, e: np.ndarray) -> np.ndarray:
    """All eigenvalues of T, ascending (dsterf: QR without square roots, about 30 K^2 operations)."""
    values, off = d.copy(), np.append(e, 0.0)
    _lapack("dsterf", d.size, values, off)
    return values


def sturm_counts(d: np.ndarray, e: np.ndarray, points_M2: np.ndarray) -> np.ndarray:
    """How many eigenvalues of T are at most each of these numbers (M, 2), by Sturm sequences (dlaebz).

    The counts are exact for a matrix whose entries differ by rounding (Demmel, Applied Numerical Linear Algebra, 5.3).
    """
    k, m = d.size, len(points_M2)
    points, counts = np.asfortranarray(points_M2), np.zeros((m, 2), np.int32, order="F")
    squares, work, integers = np.append(e**2, 0.0), np.empty(m), np.empty(m, np.int32)
    tiny = float(np.finfo(np.float64).tiny) * max(1.0, float(squares.max()))
    arguments = (0.0, 0.0, tiny, d, np.append(e, 0.0), squares, integers, points, work.copy(), np.zeros(1, np.int32))
    _lapack("dlaebz", 1, 0, k, m, m, 0, *arguments, counts, work, integers.copy())
    return counts


def is_in_blocks(d: np.ndarray, e: np.ndarray) -> bool:
    """Whether an off-diagonal of T is negligible, as with equal eigenvalues, or ones of 0."""
    tiny = np.finfo(np.float64).eps * np.sqrt(np.abs(d[:-1])) * np.sqrt(np.abs(d[1:]))
    return bool((np.abs(e) <= tiny).any())


def tridiagonal_vectors(d: np.ndarray, e: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Eigenvectors (K, M), Fortran order, of the eigenvalues `values[chosen]`; `chosen` ascending.

    Inverse iteration with Gram-Schmidt inside clusters (dstein). It would need to know the blocks of a T with a
    negligible off-diagonal; such a T goes through the slower dstemr, which finds them itself.
    """
    k, m = d.size, chosen.size
    if is_in_blocks(d, e):
        return _vectors_mrrr(d, e, chosen)
    vectors = np.empty((k, m), order="F")
    int32 = np.int32
    block, ends, fails = np.ones(k, int32), np.full(k, k, int32), np.empty(m, int32)
    work, integers = np.empty(5 * k), np.empty(k, int32)
    off = np.append(e, 0.0)
    wanted = np.ascontiguousarray(values[chosen])
    _lapack("dstein", k, d, off, m, wanted, block, ends, vectors, k, work, integers, fails)
    return vectors


def _vectors_mrrr(d: np.ndarray, e: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """`tridiagonal_vectors` by relatively robust representations (dstemr), one call per run of consecutive indices."""
    k = d.size
    runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
    parts = []
    for run in runs:
        diagonal, off, m = d.copy(), np.append(e, 0.0), len(run)
        w, z, support = np.empty(k), np.empty((k, m), order="F"), np.empty(2 * k, np.int32)
        work, integers = np.empty(18 * k), np.empty(10 * k, np.int32)
        found = np.zeros(1, np.int32)
        _lapack(
            "dstemr", "V", "I", k, diagonal, off, 0.0, 0.0, int(run[0]) + 1, int(run[-1]) + 1, found, w, z, k, m,
            support, 1, work, work.size, integers, integers.size,
        )  # fmt: skip
        parts.append(z)
    return np.asfortranarray(np.concatenate(parts, axis=1))


def all_tridiagonal_vectors(d: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Eigenvectors (K, K), ascending, in Fortran order, by divide and conquer (dstedc).

    About 4/3 K^3 operations, and far fewer where values are clustered. In clusters dstein takes K m^2 for m vectors,
    and dstemr sometimes fails.
    """
    k = d.size
    vectors, work, integers = np.empty((k, k), order="F"), np.empty(1 + 4 * k + k * k), np.empty(3 + 5 * k, np.int32)
    arguments = (d.copy(), np.append(e, 0.0), vectors, k, work, work.size, integers, integers.size)
    _lapack("dstedc", "I", k, *arguments)
    return vectors


def tridiagonal_solve(d: np.ndarray, e: np.ndarray, columns_KJ: np.ndarray) -> np.ndarray:
    """T^-1 times the columns, in place (dptsv); T is positive definite, the columns in Fortran order."""
    k, j = columns_KJ.shape
    _lapack("dptsv", k, j, d.copy(), np.append(e, 0.0), columns_KJ, k)
    return columns_KJ


def apply_reflectors(
    reflectors_KK: np.ndarray, tau: np.ndarray, vectors_KM: np.ndarray, trans: Literal["N", "T"] = "N"
) -> np.ndarray:
    """Q or Q^T times the vectors, in place (dormtr); both from `tridiagonalize` and in Fortran order."""
    k, m = vectors_KM.shape
    if k > 1:
        work = np.empty(64 * max(m, 1) + 64 * 65)
        args = ("L", "L", trans, k, m, reflectors_KK, k, np.append(tau, 0.0), vectors_KM, k, work, work.size)
        _lapack("dormtr", *args)
    return vectors_KM


def pivoted_rank(gram_KK: np.ndarray, share: float) -> int:
    """The rank of a symmetric positive semidefinite matrix: pivots above this share of the greatest (dpstrf)."""
    k = gram_KK.shape[0]
    factor, pivots, rank, info = gram_KK.copy(order="F"), np.empty(k, np.int32), np.zeros(1, np.int32), np.zeros(1)
    # `info` is 1 where the rank is below K, which is no failure, so it is passed as an array.
    _call(
        "cython_lapack",
        "dpstrf",
        "L",
        k,
        factor,
        k,
        pivots,
        rank,
        share * float(gram_KK.diagonal().max()),
        np.empty(2 * k),
        info,
    )
    return int(rank[0])


def householder_qr(matrix_KJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A = H [R; 0] (dgeqrf), J <= K: the reflectors of H (K, J) and their factors (J,)."""
    k, j = matrix_KJ.shape
    reflectors_KJ, tau, work = np.array(matrix_KJ, order="F"), np.empty(j), np.empty(64 * j)
    _lapack("dgeqrf", k, j, reflectors_KJ, k, tau, work, work.size)
    return reflectors_KJ, tau


def apply_householder(
    reflectors_KJ: np.ndarray, tau: np.ndarray, matrix: np.ndarray, side: Literal["L", "R"], trans: Literal["N", "T"]
) -> None:
    """H C, H^T C, C H or C H^T in place (dormqr), H from `householder_qr`, C in Fortran order."""
    k, j = reflectors_KJ.shape
    rows, cols = matrix.shape
    work = np.empty(64 * max(rows, cols) + 64 * 65)
    _lapack("dormqr", side, trans, rows, cols, j, reflectors_KJ, k, tau, matrix, rows, work, work.size)


class _OneThread:
    """Sets every BLAS library of the process to one thread while any thread is inside, and restores it afterwards."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._controller: Any = None
        self._limit: Any = None

    @contextmanager
    def __call__(self) -> Generator[None]:
        with self._lock:
            if self._controller is None:
                import scipy.linalg.cython_lapack  # noqa: F401 (a library that is loaded later would not be limited)
                from threadpoolctl import ThreadpoolController

                self._controller = ThreadpoolController()
            if self._inside == 0:
                self._limit = self._controller.limit(limits=1, user_api="blas")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._limit.restore_original_limits()


one_blas_thread = _OneThread()
"""Within `with one_blas_thread():` numpy's and scipy's BLAS use one thread per call, so that matrices can be solved in
parallel and have the same bits on any number of cores. (torch's own BLAS is another library and not affected.)"""
