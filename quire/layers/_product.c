/* The fast core of decoding: y = x W^T + b for one row x, or a few, by a matrix W of float32 or of int8 numbers.

   A step of decoding multiplies one row by every matrix of the model. It can be no faster than memory gives those
   matrices, and that is what this file is about; product.py beside it says what is computed, and does it by torch where
   this was not compiled.

   - W is read once, in pieces that stay in the core's cache while all rows of x meet them. Of a piece four runs of rows
     are read side by side: memory gives four streams that go on and on faster than one, and than four that jump.
   - int8 numbers become float32 in registers: y_n = scale_n * sum over k of x_k W_nk (+ b_n). Sums are float32 in a
     fixed order: the result depends neither on the number of threads nor on the number of rows.
   - Threads take pieces from a common counter. One that comes late, because something else runs on its core, finds
     nothing left to do, and nobody has waited for it: only pieces already begun are waited for. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#if !defined(__GNUC__)
#error "written in vectors of GCC and Clang; elsewhere torch serves"
#endif

enum { WIDTH = 8, RUNS = 4, STEP = 4 * WIDTH, PIECE = 1 << 17 }; /* WIDTH numbers in a vector; PIECE in bytes */

/* Vectors, wherever they lie in memory. */
typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));

typedef struct { /* N outputs, K inputs, B rows of x */
    const float *x, *bias, *scale;     /* (B, K); (N) or NULL; (N) for int8, NULL for float32 */
    const char *weight;                /* (N, K) */
    float *y;                          /* (B, N) */
    long outputs, inputs, rows, piece; /* N, K, B; piece: so many rows of W at once */
} Product;

/* ---- some rows of W by one row of x ---- */

#define INLINE static inline __attribute__((always_inline))

/* y for R rows of W that are `apart` rows from each other, the first of them row n.

   Four int8 numbers are an int32: shifted to its upper end and down again, each of them is that number with its sign.
   Eight such int32 give numbers 0, 4, 8 ... first, then 1, 5, 9 ...: x has been put in that order, 32 at a time. */
INLINE void dots(const Product *p, const float *x, float *y, long n, long apart, int R, int is_int8) {
    long K = p->inputs, k = 0, width = is_int8 ? 1 : 4;
    const char *w = p->weight + n * K * width, *at;
    Floats sums[RUNS] = {{0}};
    for (; k + STEP <= K; k += STEP) {
        const Floats *part = (const Floats *)(x + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            at = w + (r * apart * K + k) * width;
            Floats sum = sums[r];
            if (is_int8) {
                Ints four = *(const Ints *)at;
                sum += __builtin_convertvector((four << 24) >> 24, Floats) * part[0];
                sum += __builtin_convertvector((four << 16) >> 24, Floats) * part[1];
                sum += __builtin_convertvector((four << 8) >> 24, Floats) * part[2];
                sum += __builtin_convertvector(four >> 24, Floats) * part[3];
            } else {
                for (int i = 0; i < 4; i++) sum += ((const Floats *)at)[i] * part[i];
            }
            sums[r] = sum;
        }
    }
    for (int r = 0; r < R; r++) {
        Floats all = sums[r];
        float sum = ((all[0] + all[4]) + (all[1] + all[5])) + ((all[2] + all[6]) + (all[3] + all[7]));
        at = w + r * apart * K * width;
        for (long i = k; i < K; i++) sum += x[i] * (is_int8 ? (float)((int8_t *)at)[i] : ((float *)at)[i]);
        long here = n + r * apart;
        if (is_int8) sum *= p->scale[here];
        y[here] = p->bias ? sum + p->bias[here] : sum;
    }
}

INLINE void of_kind(const Product *p, long first, long last, int is_int8) {
    long apart = (last - first) / RUNS, left = first + RUNS * apart;
    for (long b = 0; b < p->rows; b++) {
        const float *x = p->x + b * p->inputs;
        float *y = p->y + b * p->outputs;
        for (long n = first; n < first + apart; n++) dots(p, x, y, n, apart, RUNS, is_int8);
        for (long n = left; n < last; n++) dots(p, x, y, n, 0, 1, is_int8);
    }
}

/* Rows first to last of W. */
INLINE void work(const Product *p, long first, long last) {
    if (p->scale)
        of_kind(p, first, last, 1);
    else
        of_kind(p, first, last, 0);
}

/* The order of x that int8 numbers want. */
static void reorder(float *to, const float *x, long rows, long K) {
    for (long b = 0; b < rows; b++, to += K, x += K) {
        long k = 0;
        for (; k + STEP <= K; k += STEP)
            for (int i = 0; i < STEP; i++) to[k + i] = x[k + i % WIDTH * 4 + i / WIDTH];
        for (; k < K; k++) to[k] = x[k];
    }
}

/* The same for each kind of processor: one is chosen when the module is loaded. */
static void work_anywhere(const Product *p, long first, long last) { work(p, first, last); }
static void (*work_here)(const Product *, long, long) = work_anywhere;
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void work_avx2(const Product *p, long a, long b) { work(p, a, b); }
#endif

/* ---- threads ----

   `ticket` holds the number of the product in its upper half, and in its lower half the next piece to be taken. Who
   raises it by one from a value he has seen owns that piece; a product is not replaced before all its pieces are done,
   so what he read of the product before is still true. */

static struct {
    pthread_mutex_t busy, lock; /* busy: a product is under way; lock: of the sleepers */
    pthread_cond_t wake;
    _Atomic uint64_t ticket;
    _Atomic long pieces, done;
    _Atomic int sleepers;
    int workers;
    Product product;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Take pieces until none is left; whether there was one. */
static int take_pieces(void) {
    int found = 0;
    for (;;) {
        uint64_t seen = atomic_load(&pool.ticket);
        int64_t piece = (int64_t)(seen & 0xFFFFFFFF);
        if (piece >= atomic_load(&pool.pieces)) return found;
        Product p = pool.product;
        if (!atomic_compare_exchange_strong(&pool.ticket, &seen, seen + 1)) continue;
        long first = piece * p.piece, last = first + p.piece;
        work_here(&p, first, last < p.outputs ? last : p.outputs);
        atomic_fetch_add(&pool.done, 1);
        found = 1;
    }
}

static void *worker(void *unused) {
    enum { PATIENCE = 3000 }; /* rests, of tens of nanoseconds each: the next product of a step comes soon */
    for (int waited = 0;; waited++) {
        if (take_pieces()) waited = 0;
        if (waited < PATIENCE) {
            rest();
            continue;
        }
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.sleepers, 1);
        uint64_t seen = atomic_load(&pool.ticket);
        if ((int64_t)(seen & 0xFFFFFFFF) >= atomic_load(&pool.pieces)) pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.sleepers, 1);
        pthread_mutex_unlock(&pool.lock);
        waited = 0;
    }
    return unused;
}

static void no_workers(void) { /* in a child of fork() */
    pool.workers = 0;
    atomic_store(&pool.sleepers, 0);
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

static void multiply(Product *p, int threads) {
    long width = p->inputs * (p->scale ? 1 : 4), most = p->outputs / (2 * threads); /* some pieces for each thread */
    p->piece = PIECE / (width + 1) + 1;
    if (p->piece > most) p->piece = most + 1;
    p->piece = (p->piece + RUNS - 1) / RUNS * RUNS;
    long pieces = (p->outputs + p->piece - 1) / p->piece;
    if (threads < 2 || pieces < 2 || pthread_mutex_trylock(&pool.busy)) { /* another thread of the program has them */
        for (long n = 0; n < p->outputs; n += p->piece)
            work_here(p, n, n + p->piece < p->outputs ? n + p->piece : p->outputs);
        return;
    }
    pthread_t thread;
    while (pool.workers < threads - 1 && !pthread_create(&thread, NULL, worker, NULL)) {
        pthread_detach(thread);
        pool.workers++;
    }
    pool.product = *p;
    atomic_store(&pool.done, 0);
    uint64_t number = (atomic_load(&pool.ticket) >> 32) + 1;
    atomic_store(&pool.ticket, number << 32 | 0xFFFFFFFF); /* nothing to take while `pieces` changes */
    atomic_store(&pool.pieces, pieces);
    atomic_store(&pool.ticket, number << 32);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    take_pieces();
    while (atomic_load(&pool.done) < pieces) rest();
    pthread_mutex_unlock(&pool.busy);
}

/* ---- Python ---- */

/* The memory of a contiguous array; 0, with an exception, where it has not `size` bytes. */
static int view(PyObject *object, Py_buffer *buffer, Py_ssize_t size, int flags) {
    if (PyObject_GetBuffer(object, buffer, flags)) return 0;
    if (buffer->len == size) return 1;
    PyErr_Format(PyExc_ValueError, "an array of %zd bytes where %zd are needed", buffer->len, size);
    PyBuffer_Release(buffer);
    return 0;
}

static PyObject *product(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count) {
    Py_buffer views[5] = {{0}}; /* y, x, weight, bias, scale */
    if (count != 9) return PyErr_Format(PyExc_TypeError, "product takes 9 arguments");
    long rows = PyLong_AsLong(given[5]), outputs = PyLong_AsLong(given[6]), inputs = PyLong_AsLong(given[7]);
    long threads = PyLong_AsLong(given[8]), wide = given[4] == Py_None ? 4 : 1;
    if (PyErr_Occurred()) return NULL;
    if (rows < 0 || outputs < 0 || inputs < 0 || threads < 1)
        return PyErr_Format(PyExc_ValueError, "sizes are not negative, and there is a thread");
    float *ordered = NULL;
    Py_ssize_t sizes[5] = {4 * rows * outputs, 4 * rows * inputs, wide * outputs * inputs, 4 * outputs, 4 * outputs};
    PyObject *result = NULL;
    for (int i = 0; i < 5; i++)
        if (given[i] != Py_None && !view(given[i], &views[i], sizes[i], i ? PyBUF_SIMPLE : PyBUF_WRITABLE)) goto end;
    Product p = {.x = views[1].buf, .weight = views[2].buf, .bias = views[3].buf, .scale = views[4].buf,
                 .y = views[0].buf, .outputs = outputs, .inputs = inputs, .rows = rows};
    if (p.scale) {
        if (!(ordered = malloc(sizes[1] + 1))) {
            PyErr_NoMemory();
            goto end;
        }
        reorder(ordered, p.x, rows, inputs);
        p.x = ordered;
    }
    Py_BEGIN_ALLOW_THREADS
    multiply(&p, (int)threads);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
end:
    free(ordered);
    for (int i = 0; i < 5; i++)
        if (views[i].obj) PyBuffer_Release(&views[i]);
    return result;
}

static PyMethodDef methods[] = {
    {"product", (PyCFunction)(void (*)(void))product, METH_FASTCALL,
     "product(y, x, weight, bias, scale, rows, outputs, inputs, threads): fills y"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_product", "The fast core of decoding.", -1, methods,
                                       NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__product(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) work_here = work_avx2;
#endif
    pthread_atfork(NULL, NULL, no_workers);
    return PyModule_Create(&definition);
}
