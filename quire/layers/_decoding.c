/* The fast core of decoding: y = x W^T + b for one row x, or a few, by a matrix W of float32 or of int8 numbers; and a
   whole block of a decoder for one row, which is seven such products and the little between them.

   A step of decoding multiplies one row by every matrix of the model. It can be no faster than memory gives those
   matrices, and that is what this file is about; product.py and fixed_block.py beside it say what is computed, and do it
   by torch where this was not compiled.

   - W is read once, in pieces that stay in the core's cache while all rows of x meet them. Of a piece four runs of rows
     are read side by side: memory gives four streams that go on and on faster than one, and than four that jump.
   - int8 numbers become float32 in registers: y_n = scale_n * sum over k of x_k W_nk (+ b_n). Sums are float32 in a
     fixed order: the result depends neither on the number of threads nor on the number of rows.
   - Threads take pieces from a common counter. One that comes late, because something else runs on its core, finds
     nothing left to do, and nobody has waited for it: only pieces already begun are waited for. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__)
#error "written in vectors of GCC and Clang; elsewhere torch serves"
#endif

enum { WIDTH = 8, RUNS = 4, STEP = 4 * WIDTH, PIECE = 1 << 17 }; /* WIDTH numbers in a vector; PIECE in bytes */

/* Vectors, wherever they lie in memory. */
typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));

typedef struct { /* N outputs, K inputs, B rows of x */
    const float *x, *bias, *scale; /* (B, K); (N) or NULL; (N) for int8, NULL for float32 */
    const char *weight;            /* (N, K) */
    float *y;                      /* (B, N) */
    long outputs, inputs, rows;    /* N, K, B */
} Product;

/* ---- some rows of W by one row of x ---- */

#define INLINE static inline __attribute__((always_inline))

INLINE float total(Floats all) {
    return ((all[0] + all[4]) + (all[1] + all[5])) + ((all[2] + all[6]) + (all[3] + all[7]));
}

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
        float sum = total(sums[r]);
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

/* ---- attention of one row ---- */

typedef struct { /* G query heads for each of K key heads, D numbers a head, S positions of which each sees all */
    const float *query, *keys, *values; /* (K G, D); (K, capacity, D) both */
    float *scores, *mixed;              /* (K G, S); (K G, D) */
    long groups, size, positions, capacity;
} Attention;

INLINE float dot(const float *a, const float *b, long n) {
    Floats sums = {0};
    long i = 0;
    for (; i + WIDTH <= n; i += WIDTH) sums += *(const Floats *)(a + i) * *(const Floats *)(b + i);
    float sum = total(sums);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* softmax(q K^T / sqrt(D)) V for the query heads of some key heads. */
INLINE void attend(const Attention *a, long first, long last) {
    long D = a->size, S = a->positions;
    for (long head = first * a->groups; head < last * a->groups; head++) {
        const float *keys = a->keys + head / a->groups * a->capacity * D, *values = a->values + (keys - a->keys);
        const float *query = a->query + head * D;
        float *restrict mixed = a->mixed + head * D, *scores = a->scores + head * S;
        float most = -INFINITY, sum = 0, scale = 1 / sqrtf((float)D);
        for (long s = 0; s < S; s++) {
            scores[s] = scale * dot(query, keys + s * D, D);
            if (scores[s] > most) most = scores[s];
        }
        for (long s = 0; s < S; s++) sum += scores[s] = expf(scores[s] - most);
        memset(mixed, 0, D * sizeof(float));
        long s = 0;
        for (; s + 4 <= S; s += 4) { /* four at once: `mixed` is fetched and put back a quarter as often */
            const float *v = values + s * D, *w = scores + s;
            for (long d = 0; d < D; d++)
                mixed[d] += w[0] * v[d] + w[1] * v[D + d] + w[2] * v[2 * D + d] + w[3] * v[3 * D + d];
        }
        for (; s < S; s++)
            for (long d = 0; d < D; d++) mixed[d] += scores[s] * values[s * D + d];
        for (long d = 0; d < D; d++) mixed[d] /= sum;
    }
}

/* ---- the same for each kind of processor: one is chosen when the module is loaded ---- */

typedef void Part(const void *what, long first, long last);

static void product_anywhere(const void *p, long first, long last) { work(p, first, last); }
static void attend_anywhere(const void *a, long first, long last) { attend(a, first, last); }
static Part *product_here = product_anywhere, *attend_here = attend_anywhere;
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void product_avx2(const void *p, long a, long b) { work(p, a, b); }
__attribute__((target("avx2,fma"))) static void attend_avx2(const void *a, long b, long c) { attend(a, b, c); }
#endif

/* ---- threads ----

   `ticket` holds the number of the job in its upper half, and in its lower half the next piece to be taken. Who raises
   it by one from a value he has seen owns that piece; a job is not replaced before all its pieces are done, so what he
   read of the job before is still true. */

typedef struct { /* `part` does some of all `count` of what is to be done: a `piece` at once */
    Part *part;
    const void *what;
    long count, piece;
} Job;

static struct {
    pthread_mutex_t busy, lock; /* busy: a job is under way; lock: of the sleepers */
    pthread_cond_t wake;
    _Atomic uint64_t ticket;
    _Atomic long pieces, done;
    _Atomic int sleepers;
    int workers;
    Job job;
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
        Job job = pool.job;
        if (!atomic_compare_exchange_strong(&pool.ticket, &seen, seen + 1)) continue;
        long first = piece * job.piece, last = first + job.piece;
        job.part(job.what, first, last < job.count ? last : job.count);
        atomic_fetch_add(&pool.done, 1);
        found = 1;
    }
}

static void *worker(void *unused) {
    enum { PATIENCE = 8000 }; /* rests, of tens of nanoseconds each: the next job of a step comes soon */
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

static void share(Job job, int threads) {
    long pieces = (job.count + job.piece - 1) / job.piece;
    if (threads < 2 || pieces < 2 || pthread_mutex_trylock(&pool.busy)) { /* another thread of the program has them */
        job.part(job.what, 0, job.count);
        return;
    }
    pthread_t thread;
    while (pool.workers < threads - 1 && !pthread_create(&thread, NULL, worker, NULL)) {
        pthread_detach(thread);
        pool.workers++;
    }
    pool.job = job;
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

static void multiply(const Product *p, int threads) {
    long width = p->inputs * (p->scale ? 1 : 4), most = p->outputs / (2 * threads); /* some pieces for each thread */
    long piece = PIECE / (width + 1) + 1;
    if (piece > most) piece = most + 1;
    share((Job){product_here, p, p->outputs, (piece + RUNS - 1) / RUNS * RUNS}, threads);
}

/* ---- a block ---- */

typedef struct {
    const char *weight; /* (outputs, inputs); NULL where the block has no such matrix */
    const float *bias, *scale;
    long outputs, inputs;
} Matrix;

typedef struct {
    const float *weight, *bias; /* weight NULL: no such normalization */
    double epsilon;
    int centred; /* the mean is taken off: layer normalization */
} Norm;

enum { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN, MATRICES };
enum { ATTENTION_NORM, FEEDFORWARD_NORM, QUERY_NORM, KEY_NORM, NORMS };
enum { RELU, SQUARED_RELU, GELU, GELU_TANH, SILU, ACTIVATIONS };
enum { VIEWS = 3 * MATRICES + 2 * NORMS };

typedef struct {
    Matrix matrices[MATRICES];
    Norm norms[NORMS];
    long heads, kv_heads, size; /* D, of a head */
    int activation;
    Py_buffer views[VIEWS]; /* holds the memory that all this points to */
    int held;
} Block;

/* y = x / sqrt(mean(x^2) + epsilon) * weight (+ bias), of x less its mean where it is to be centred. */
static void normalize(float *y, const float *x, long n, const Norm *norm) {
    double mean = 0, square = 0;
    if (norm->centred) {
        for (long i = 0; i < n; i++) mean += x[i];
        mean /= (double)n;
    }
    for (long i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    double share = 1 / sqrt(square / (double)n + norm->epsilon);
    for (long i = 0; i < n; i++) {
        y[i] = (float)((x[i] - mean) * share) * norm->weight[i];
        if (norm->bias) y[i] += norm->bias[i];
    }
}

/* Turn each pair (i, i + D/2) of some heads by its angle. */
static void turn(float *x, long heads, long D, const float *cosine, const float *sine) {
    for (long half = D / 2; heads--; x += D)
        for (long i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cosine[i] - b * sine[i];
            x[i + half] = b * cosine[i] + a * sine[i];
        }
}

static void bend(float *x, long n, int activation) {
    for (long i = 0; i < n; i++) {
        float v = x[i], positive = v > 0 ? v : 0;
        switch (activation) {
        case RELU: x[i] = positive; break;
        case SQUARED_RELU: x[i] = positive * positive; break;
        case GELU: x[i] = 0.5f * v * (1 + erff(v * 0.70710678f)); break;
        case GELU_TANH: x[i] = 0.5f * v * (1 + tanhf(0.79788456f * (v + 0.044715f * v * v * v))); break;
        default: x[i] = v / (1 + expf(-v)); /* SILU */
        }
    }
}

static void apply(const Matrix *m, const float *x, float *y, float *ordered, int threads) {
    Product p = {x, m->bias, m->scale, m->weight, y, m->outputs, m->inputs, 1};
    if (p.scale) {
        reorder(ordered, x, 1, m->inputs);
        p.x = ordered;
    }
    multiply(&p, threads);
}

/* x (C) through the block, in place: position number `past`, whose key and value go into the cache behind the others. */
static int step(const Block *b, float *x, const float *cosine, const float *sine, float *keys, float *values, long past,
                long capacity, int threads) {
    const Matrix *m = b->matrices;
    const Norm *norms = b->norms;
    long C = m[QUERY].inputs, D = b->size, H = b->heads, K = b->kv_heads, F = m[UP].outputs, S = past + 1;
    long widest = C > H * D ? C : H * D;
    if (F > widest) widest = F;
    float *room = malloc(sizeof(float) * (2 * C + 2 * H * D + 2 * K * D + 2 * F + widest + H * S));
    if (!room) return 0;
    float *normed = room, *added = normed + C, *query = added + C, *mixed = query + H * D, *key = mixed + H * D;
    float *value = key + K * D, *gate = value + K * D, *up = gate + F, *ordered = up + F, *scores = ordered + widest;

    normalize(normed, x, C, &norms[ATTENTION_NORM]);
    apply(&m[QUERY], normed, query, ordered, threads);
    apply(&m[KEY], normed, key, ordered, threads);
    apply(&m[VALUE], normed, value, ordered, threads);
    if (norms[QUERY_NORM].weight) {
        for (long h = 0; h < H; h++) normalize(query + h * D, query + h * D, D, &norms[QUERY_NORM]);
        for (long h = 0; h < K; h++) normalize(key + h * D, key + h * D, D, &norms[KEY_NORM]);
    }
    if (cosine) {
        turn(query, H, D, cosine, sine);
        turn(key, K, D, cosine, sine);
    }
    for (long h = 0; h < K; h++) {
        memcpy(keys + (h * capacity + past) * D, key + h * D, D * sizeof(float));
        memcpy(values + (h * capacity + past) * D, value + h * D, D * sizeof(float));
    }
    Attention a = {query, keys, values, scores, mixed, H / K, D, S, capacity};
    share((Job){attend_here, &a, K, 1}, H * S * D < (1 << 15) ? 1 : threads); /* a short text is read sooner than told */
    apply(&m[OUTPUT], mixed, added, ordered, threads);
    for (long i = 0; i < C; i++) x[i] += added[i];

    normalize(normed, x, C, &norms[FEEDFORWARD_NORM]);
    apply(&m[UP], normed, up, ordered, threads);
    if (m[GATE].weight) {
        apply(&m[GATE], normed, gate, ordered, threads);
        bend(gate, F, b->activation);
        for (long i = 0; i < F; i++) up[i] *= gate[i];
    } else
        bend(up, F, b->activation);
    apply(&m[DOWN], up, added, ordered, threads);
    for (long i = 0; i < C; i++) x[i] += added[i];
    free(room);
    return 1;
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

static void forget(PyObject *capsule) {
    Block *b = PyCapsule_GetPointer(capsule, "block");
    for (int i = 0; i < b->held; i++) PyBuffer_Release(&b->views[i]);
    free(b);
}

/* The memory of an array, held as long as the block; NULL for None, and, with an exception, where it has not `size`
   bytes. */
static const void *hold(Block *b, PyObject *array, Py_ssize_t size) {
    if (array == Py_None || !view(array, &b->views[b->held], size, PyBUF_SIMPLE)) return NULL;
    return b->views[b->held++].buf;
}

static PyObject *block(PyObject *Py_UNUSED(module), PyObject *given) {
    PyObject *matrices, *norms, *result = NULL;
    Block *b = calloc(1, sizeof(Block));
    if (!b) return PyErr_NoMemory();
    if (!PyArg_ParseTuple(given, "O!O!llli", &PyTuple_Type, &matrices, &PyTuple_Type, &norms, &b->heads, &b->kv_heads,
                          &b->size, &b->activation))
        goto failed;
    if (PyTuple_Size(matrices) != MATRICES || PyTuple_Size(norms) != NORMS || b->activation < 0 ||
        b->activation >= ACTIVATIONS || b->heads < 1 || b->kv_heads < 1 || b->size < 1 || b->heads % b->kv_heads) {
        PyErr_SetString(PyExc_ValueError, "no block of a decoder");
        goto failed;
    }
    for (int i = 0; i < MATRICES; i++) {
        Matrix *m = &b->matrices[i];
        PyObject *weight, *bias, *scale, *each = PyTuple_GET_ITEM(matrices, i);
        if (each == Py_None && i == GATE) continue;
        if (!PyArg_ParseTuple(each, "OOOll", &weight, &bias, &scale, &m->outputs, &m->inputs)) goto failed;
        m->weight = hold(b, weight, (scale == Py_None ? 4 : 1) * m->outputs * m->inputs);
        m->bias = hold(b, bias, 4 * m->outputs);
        m->scale = hold(b, scale, 4 * m->outputs);
        if (PyErr_Occurred()) goto failed;
        if (!m->weight) {
            PyErr_SetString(PyExc_ValueError, "a matrix of the block is missing");
            goto failed;
        }
    }
    for (int i = 0; i < NORMS; i++) {
        Norm *norm = &b->norms[i];
        PyObject *weight, *bias, *each = PyTuple_GET_ITEM(norms, i);
        long size = i < QUERY_NORM ? b->matrices[QUERY].inputs : b->size;
        if (each == Py_None && i >= QUERY_NORM) continue;
        if (!PyArg_ParseTuple(each, "OOdi", &weight, &bias, &norm->epsilon, &norm->centred)) goto failed;
        norm->weight = hold(b, weight, 4 * size);
        norm->bias = hold(b, bias, 4 * size);
        if (PyErr_Occurred()) goto failed;
    }
    const Matrix *m = b->matrices;
    long C = m[QUERY].inputs, wide = b->heads * b->size, narrow = b->kv_heads * b->size, F = m[UP].outputs;
    long shapes[MATRICES][2] = {{wide, C}, {narrow, C}, {narrow, C}, {C, wide}, {F, C}, {F, C}, {C, F}};
    for (int i = 0; i < MATRICES; i++)
        if (m[i].weight && (m[i].outputs != shapes[i][0] || m[i].inputs != shapes[i][1])) {
            PyErr_SetString(PyExc_ValueError, "the matrices of the block do not fit each other");
            goto failed;
        }
    if ((result = PyCapsule_New(b, "block", forget))) return result;
failed:
    for (int i = 0; i < b->held; i++) PyBuffer_Release(&b->views[i]);
    free(b);
    return NULL;
}

static PyObject *step_block(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count) {
    Py_buffer views[5] = {{0}}; /* x, cosine, sine, keys, values */
    if (count != 9) return PyErr_Format(PyExc_TypeError, "step takes 9 arguments");
    const Block *b = PyCapsule_GetPointer(given[0], "block");
    long past = PyLong_AsLong(given[6]), capacity = PyLong_AsLong(given[7]), threads = PyLong_AsLong(given[8]);
    if (PyErr_Occurred()) return NULL;
    if (past < 0 || past >= capacity || threads < 1)
        return PyErr_Format(PyExc_ValueError, "the cache has no room, or there is no thread");
    Py_ssize_t half = 4 * (b->size / 2), cache = 4 * b->kv_heads * capacity * b->size;
    Py_ssize_t sizes[5] = {4 * b->matrices[QUERY].inputs, half, half, cache, cache};
    PyObject *result = NULL;
    int done = 0;
    for (int i = 0; i < 5; i++) {
        int flags = i == 1 || i == 2 ? PyBUF_SIMPLE : PyBUF_WRITABLE;
        if (given[i + 1] == Py_None && flags == PyBUF_SIMPLE) continue;
        if (!view(given[i + 1], &views[i], sizes[i], flags)) goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    done = step(b, views[0].buf, views[1].buf, views[2].buf, views[3].buf, views[4].buf, past, capacity, (int)threads);
    Py_END_ALLOW_THREADS
    result = done ? Py_NewRef(Py_None) : PyErr_NoMemory();
end:
    for (int i = 0; i < 5; i++)
        if (views[i].obj) PyBuffer_Release(&views[i]);
    return result;
}

static PyMethodDef methods[] = {
    {"product", (PyCFunction)(void (*)(void))product, METH_FASTCALL,
     "product(y, x, weight, bias, scale, rows, outputs, inputs, threads): fills y"},
    {"block", block, METH_VARARGS,
     "block(matrices, norms, heads, kv_heads, head_size, activation): what step takes, and holds on to their memory"},
    {"step", (PyCFunction)(void (*)(void))step_block, METH_FASTCALL,
     "step(block, x, cosine, sine, keys, values, past, capacity, threads): changes x, and fills the cache at `past`"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_decoding", "The fast core of decoding.", -1, methods,
                                       NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__decoding(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) product_here = product_avx2, attend_here = attend_avx2;
#endif
    pthread_atfork(NULL, NULL, no_workers);
    return PyModule_Create(&definition);
}
