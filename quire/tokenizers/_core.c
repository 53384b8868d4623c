/* The fast core of byte-level BPE: splits UTF-8 text into pieces, counts them, learns merges and applies them.

   It gives the very tokens that the Python beside it gives: splitting as in patterns.py, learning and applying merges
   as in merges.py, which read like the algorithms and are where to begin. Here every step is a few loads and stores:

   - a piece is found by a scan of its bytes, and looked up in a hash table keyed by its first eight bytes;
   - learning keeps, for each pair, the list of the places where it stands, so that a merge touches nothing else;
   - applying merges to a long piece does the same, and to a short one simply looks for the lowest rank again.

   Python objects appear in the last section only, and the interpreter's lock is released around all the work. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "first_bytes() reads the bytes of a word in little-endian order; elsewhere the Python reference serves"
#endif

typedef const uint8_t *Bytes;

/* A vector that doubles. `reserve` makes room for one more element; it gives 0 where memory is out. */
#define VECTOR(type) struct { type *at; size_t count, room; }
#define double_room(v) grow(&(v).at, &(v).room, sizeof *(v).at)
#define reserve(v) ((v).count < (v).room || double_room(v))

static int grow(void *at, size_t *room, size_t width) { /* at: the address of a pointer, of whatever type */
    size_t wanted = *room ? 2 * *room : 256;
    void *old, *moved;
    memcpy(&old, at, sizeof old);
    if (!(moved = realloc(old, wanted * width))) return 0;
    memcpy(at, &moved, sizeof moved), *room = wanted;
    return 1;
}

/* Memory for a row: of a long one the pages are large, or the kernel spends as much time on them as the work takes. */
static void *row_memory(size_t size) {
    char *at = malloc(size);
#ifdef MADV_HUGEPAGE
    size_t page = 1 << 21, skip = at ? (page - (uintptr_t)at % page) % page : 0;
    if (at && size > skip + page) madvise(at + skip, (size - skip) / page * page, MADV_HUGEPAGE);
#endif
    return at;
}

/* ---- splitting: patterns.py by hand ---- */

enum { OTHER, LETTER, NUMBER, SPACE };
enum { GPT2, CL100K, CL100K_HF };

typedef struct { Bytes text, classes; size_t length; } Reader; /* classes: one byte for each code point */

/* The class of the character at i, and its bytes in *size. A byte that begins no valid UTF-8 is a character OTHER. */
static int class_at(const Reader *r, size_t i, size_t *size) {
    Bytes s = r->text + i;
    size_t left = r->length - i;
    uint32_t code = s[0];
    *size = 1;
    if (code < 0x80) return r->classes[code];
#define TAIL(k) (left > k && (s[k] & 0xC0) == 0x80)
    if (code >= 0xC2 && code < 0xE0 && TAIL(1)) {
        *size = 2;
        return r->classes[(code & 0x1F) << 6 | (s[1] & 0x3F)];
    }
    if (code >= 0xE0 && code < 0xF0 && TAIL(1) && TAIL(2)) {
        code = (code & 0x0F) << 12 | (s[1] & 0x3F) << 6 | (s[2] & 0x3F);
        if (code < 0x800 || (code >= 0xD800 && code < 0xE000)) return OTHER;
        *size = 3;
        return r->classes[code];
    }
    if (code >= 0xF0 && code < 0xF5 && TAIL(1) && TAIL(2) && TAIL(3)) {
        code = (code & 0x07) << 18 | (s[1] & 0x3F) << 12 | (s[2] & 0x3F) << 6 | (s[3] & 0x3F);
        if (code < 0x10000 || code > 0x10FFFF) return OTHER;
        *size = 4;
        return r->classes[code];
    }
    return OTHER;
}

/* The end of the run of characters of one class that begins at i; *last is where its last character begins. */
static size_t run_end(const Reader *r, size_t i, int class, size_t most, size_t *last) {
    for (size_t size; i < r->length && most-- && class_at(r, i, &size) == class; i += size) *last = i;
    return i;
}

/* The bytes of 's 't 're 've 'm 'll 'd at i, or 0; in any case (the long s too) for cl100k. */
static size_t contraction(const Reader *r, size_t i, int any_case) {
    Bytes s = r->text + i;
    size_t left = r->length - i;
    if (left < 2 || s[0] != '\'') return 0;
    uint8_t fold = any_case ? 0x20 : 0, a = s[1] | fold, b = left > 2 ? s[2] | fold : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) return 3;
    return any_case && left > 2 && s[1] == 0xC5 && s[2] == 0xBF ? 3 : 0;
}

static int is_line_end(uint8_t byte) { return byte == '\n' || byte == '\r'; }

/* Where the piece that begins at i ends; i is before the end of the text. */
static size_t piece_end(const Reader *r, size_t i, int pattern) {
    Bytes s = r->text;
    size_t size, second, last = i, end = contraction(r, i, pattern != GPT2);
    if (end) return i + end;
    int class = class_at(r, i, &size);
    int follows = i + size < r->length ? class_at(r, i + size, &second) : SPACE;
    if (pattern == GPT2) {
        if (s[i] == ' ' && follows != SPACE) return run_end(r, i + 1, follows, SIZE_MAX, &last);
        if (class != SPACE) return run_end(r, i, class, SIZE_MAX, &last);
    } else {
        if (class == LETTER) return run_end(r, i, LETTER, SIZE_MAX, &last);
        if (class == NUMBER) return run_end(r, i, NUMBER, 3, &last);
        if (follows == LETTER && !is_line_end(s[i])) return run_end(r, i + size, LETTER, SIZE_MAX, &last);
        if (class == OTHER || (s[i] == ' ' && follows == OTHER)) {
            end = run_end(r, class == OTHER ? i : i + 1, OTHER, SIZE_MAX, &last);
            while (end < r->length && is_line_end(s[end])) end++;
            return end;
        }
    }
    end = run_end(r, i, SPACE, SIZE_MAX, &last);
    if (end == r->length && pattern != CL100K_HF) return end;
    if (pattern != GPT2)
        for (size_t k = end; k > i; k--)
            if (is_line_end(s[k - 1])) return k;
    return last > i && end < r->length ? last : end;
}

/* ---- a table of pieces ---- */

typedef struct { uint64_t first, where; uint32_t length, ids; int64_t value; } Piece; /* length 0: an empty slot */
typedef struct { Piece *slots; size_t mask, count; VECTOR(uint8_t) text; } Pieces;     /* text: the pieces' bytes */

/* Up to eight bytes as a number; `room` bytes may be read. */
static uint64_t first_bytes(Bytes s, size_t length, size_t room) {
    uint64_t word = 0;
    if (length >= 8) memcpy(&word, s, 8);
    else if (room >= 8) memcpy(&word, s, 8), word &= (UINT64_C(1) << 8 * length) - 1;
    else memcpy(&word, s, length);
    return word;
}

static uint64_t mix(uint64_t x) { /* every bit, the highest too, counts in the low bits, which choose the slot */
    x = (x ^ x >> 32) * UINT64_C(0x9E3779B97F4A7C15);
    return x ^ x >> 32;
}

static int pieces_resize(Pieces *p, size_t slots) {
    Piece *old = p->slots, *fresh = calloc(slots, sizeof *fresh);
    if (!fresh) return 0;
    for (size_t i = 0; old && i <= p->mask; i++) {
        if (!old[i].length) continue;
        uint64_t hash = mix(old[i].first ^ old[i].length);
        for (size_t k = 8; k < old[i].length; k += 8)
            hash = mix(hash ^ first_bytes(p->text.at + old[i].where + k, old[i].length - k, 0));
        size_t slot = hash & (slots - 1);
        while (fresh[slot].length) slot = (slot + 1) & (slots - 1);
        fresh[slot] = old[i];
    }
    free(old);
    p->slots = fresh, p->mask = slots - 1;
    return 1;
}

/* The entry of a piece, made (value 0) where there is none; NULL where memory is out. `room` as in first_bytes.
   With `make` 0 nothing is made: NULL where there is none. */
static Piece *piece_at(Pieces *p, Bytes s, size_t length, size_t room, int make) {
    if (!make && !p->count) return NULL;
    if (length > UINT32_MAX || (p->count * 2 >= p->mask && !pieces_resize(p, p->slots ? 2 * (p->mask + 1) : 1 << 12)))
        return NULL;
    uint64_t first = first_bytes(s, length, room), hash = mix(first ^ length);
    for (size_t k = 8; k < length; k += 8) hash = mix(hash ^ first_bytes(s + k, length - k, room - k));
    for (size_t slot = hash & p->mask;; slot = (slot + 1) & p->mask) {
        Piece *piece = p->slots + slot;
        if (!piece->length) {
            if (!make) return NULL;
            size_t kept = length > 8 ? length : 0; /* short ones are in `first` already */
            while (p->text.count + kept > p->text.room)
                if (!double_room(p->text)) return NULL;
            if (kept) memcpy(p->text.at + p->text.count, s, kept);
            *piece = (Piece){.first = first, .where = p->text.count, .length = (uint32_t)length};
            p->text.count += kept, p->count++;
            return piece;
        }
        if (piece->first == first && piece->length == length &&
            (length <= 8 || !memcmp(p->text.at + piece->where + 8, s + 8, length - 8)))
            return piece;
    }
}

static void pieces_free(Pieces *p) { free(p->slots), free(p->text.at), memset(p, 0, sizeof *p); }

static Bytes piece_bytes(const Pieces *p, const Piece *piece) {
    return piece->length > 8 ? p->text.at + piece->where : (Bytes)&piece->first;
}

static int count_pieces(Pieces *p, const Reader *r, int pattern) {
    for (size_t i = 0, end; i < r->length; i = end) {
        end = piece_end(r, i, pattern);
        Piece *piece = piece_at(p, r->text + i, end - i, r->length - i, 1);
        if (!piece) return 0;
        piece->value++;
    }
    return 1;
}

/* ---- places of pairs: a row of tokens over bytes, each token's id at its first and its last byte ---- */

/* The tokens of one or several pieces, an id of -1 between pieces. A place is where a token begins; it is in one
   list, that of the pair it makes with the next token (learning) or of that pair's rank (applying). */
typedef struct { int32_t *id, *before, *after; } Row;
typedef struct { int32_t head, tail; } List;

static int row_make(Row *row, size_t length) {
    row->id = row_memory(3 * length * sizeof *row->id);
    row->before = row->id + length, row->after = row->id + 2 * length;
    return row->id != NULL;
}

/* Into the list in order of place: nearly always at its end. */
static void list_add(Row *row, List *list, int32_t place) {
    int32_t before = list->tail;
    while (before > place) before = row->before[before];
    int32_t after = before < 0 ? list->head : row->after[before];
    row->before[place] = before, row->after[place] = after;
    *(before < 0 ? &list->head : &row->after[before]) = place;
    *(after < 0 ? &list->tail : &row->before[after]) = place;
}

static void list_remove(Row *row, List *list, int32_t place) {
    int32_t before = row->before[place], after = row->after[place];
    *(before < 0 ? &list->head : &row->after[before]) = after;
    *(after < 0 ? &list->tail : &row->before[after]) = before;
}

/* ---- a table of pairs ---- */

typedef struct { uint64_t key; int64_t count; List places; } Pair; /* key: left id + 1, right id; count: or rank */
typedef struct { Pair *slots; size_t mask, count; } Pairs;

static uint64_t pair_key(int32_t left, int32_t right) { return (uint64_t)(left + 1) << 32 | (uint32_t)right; }

static Pair *pair_find(const Pairs *p, uint64_t key) { /* its slot, or the empty one (key 0) where it would be */
    size_t slot = (mix(key) ^ key) & p->mask;
    while (p->slots[slot].key && p->slots[slot].key != key) slot = (slot + 1) & p->mask;
    return p->slots + slot;
}

static Pair *pair_at(Pairs *p, uint64_t key) { /* made where there is none; NULL where memory is out */
    if (p->count * 2 >= p->mask) {
        size_t slots = p->slots ? 2 * (p->mask + 1) : 1 << 12, old_mask = p->mask;
        Pair *old = p->slots, *fresh = calloc(slots, sizeof *fresh);
        if (!fresh) return NULL;
        p->slots = fresh, p->mask = slots - 1;
        for (size_t i = 0; old && i <= old_mask; i++)
            if (old[i].key) *pair_find(p, old[i].key) = old[i];
        free(old);
    }
    Pair *pair = pair_find(p, key);
    if (!pair->key) *pair = (Pair){.key = key, .places = {-1, -1}}, p->count++;
    return pair;
}

/* ---- a heap: the largest count first, of equal ones the smallest key ---- */

typedef struct { int64_t count; uint64_t key; } Candidate;
typedef VECTOR(Candidate) Heap;

static int precedes(Candidate a, Candidate b) { return a.count != b.count ? a.count > b.count : a.key < b.key; }

static int heap_push(Heap *h, Candidate c) {
    if (!reserve(*h)) return 0;
    size_t i = h->count++;
    for (; i && precedes(c, h->at[(i - 1) / 2]); i = (i - 1) / 2) h->at[i] = h->at[(i - 1) / 2];
    h->at[i] = c;
    return 1;
}

static Candidate heap_pop(Heap *h) {
    Candidate top = h->at[0], last = h->at[--h->count];
    size_t i = 0, child;
    for (; (child = 2 * i + 1) < h->count; i = child) {
        if (child + 1 < h->count && precedes(h->at[child + 1], h->at[child])) child++;
        if (!precedes(h->at[child], last)) break;
        h->at[i] = h->at[child];
    }
    h->at[i] = last;
    return top;
}

/* ---- learning merges ---- */

typedef struct {
    Row row;
    int64_t *weight;           /* of each place: how often its piece occurs */
    Pairs pairs;
    VECTOR(int32_t) size;      /* bytes of each token */
    VECTOR(uint64_t) fresh;    /* pairs first met in this step */
    Heap heap;
} Learner;

static int pair_gain(Learner *l, int32_t left, int32_t right, int32_t place) {
    Pair *pair = pair_at(&l->pairs, pair_key(left, right));
    if (!pair || !reserve(l->fresh)) return 0;
    if (!pair->count) l->fresh.at[l->fresh.count++] = pair->key;
    pair->count += l->weight[place];
    list_add(&l->row, &pair->places, place);
    return 1;
}

static void pair_lose(Learner *l, int32_t left, int32_t right, int32_t place) {
    Pair *pair = pair_find(&l->pairs, pair_key(left, right));
    pair->count -= l->weight[place];
    list_remove(&l->row, &pair->places, place);
}

/* Make token `merged` wherever `left` is followed by `right`, from the first place to the last. */
static int merge_everywhere(Learner *l, int32_t left, int32_t right, int32_t merged) {
    int32_t *id = l->row.id, *size = l->size.at, place;
    while ((place = pair_find(&l->pairs, pair_key(left, right))->places.head) >= 0) {
        int32_t second = place + size[left], next = second + size[right];
        int32_t previous = id[place - 1] < 0 ? -1 : place - size[id[place - 1]];
        if (previous >= 0) pair_lose(l, id[previous], left, previous);
        if (id[next] >= 0) pair_lose(l, right, id[next], second);
        pair_lose(l, left, right, place);
        id[place] = id[next - 1] = merged;
        if (previous >= 0 && !pair_gain(l, id[previous], merged, previous)) return 0;
        if (id[next] >= 0 && !pair_gain(l, merged, id[next], place)) return 0;
    }
    return 1;
}

static int push_fresh(Learner *l) {
    for (; l->fresh.count; l->fresh.count--) {
        uint64_t key = l->fresh.at[l->fresh.count - 1];
        if (!heap_push(&l->heap, (Candidate){pair_find(&l->pairs, key)->count, key})) return 0;
    }
    return 1;
}

/* Lay the pieces out in one row, and list the places of every pair of bytes. */
static int learner_fill(Learner *l, const Pieces *p, size_t length) {
    int32_t *id = l->row.id, place = 0;
    id[place++] = -1;
    for (size_t i = 0; p->slots && i <= p->mask; i++) {
        const Piece *piece = p->slots + i;
        if (piece->length < 2) continue;
        Bytes s = piece_bytes(p, piece);
        for (uint32_t k = 0; k < piece->length; k++, place++) id[place] = s[k], l->weight[place] = piece->value;
        id[place++] = -1;
    }
    for (size_t k = 1; k + 1 < length; k++)
        if (id[k] >= 0 && id[k + 1] >= 0 && !pair_gain(l, id[k], id[k + 1], (int32_t)k)) return 0;
    for (int byte = 0; byte < 256; byte++) {
        if (!reserve(l->size)) return 0;
        l->size.at[l->size.count++] = 1;
    }
    return push_fresh(l);
}

/* Up to `wanted` merges as pairs of ids into `merges`; how many, or -1 where memory is out. Merge i makes 256 + i. */
static int64_t learn(const Pieces *p, size_t wanted, int64_t fewest, int32_t *merges) {
    size_t length = 1, made = 0;
    for (size_t i = 0; p->slots && i <= p->mask; i++)
        if (p->slots[i].length >= 2) length += p->slots[i].length + 1;
    if (length > INT32_MAX) return -1;
    Learner l = {0};
    l.weight = row_memory(length * sizeof *l.weight);
    int good = row_make(&l.row, length) && l.weight && learner_fill(&l, p, length);
    while (good && made < wanted && l.heap.count) {
        Candidate best = heap_pop(&l.heap);
        int64_t count = pair_find(&l.pairs, best.key)->count;
        if (count < fewest) continue;
        if (count != best.count) { /* it has lost places since it was put here */
            good = heap_push(&l.heap, (Candidate){count, best.key});
            continue;
        }
        int32_t left = (int32_t)(best.key >> 32) - 1, right = (int32_t)(uint32_t)best.key;
        merges[2 * made] = left, merges[2 * made + 1] = right;
        if (!(good = reserve(l.size))) break;
        l.size.at[l.size.count++] = l.size.at[left] + l.size.at[right];
        good = merge_everywhere(&l, left, right, (int32_t)(256 + made++)) && push_fresh(&l);
    }
    free(l.row.id), free(l.weight), free(l.pairs.slots), free(l.size.at), free(l.fresh.at), free(l.heap.at);
    return good ? (int64_t)made : -1;
}

/* ---- applying merges ---- */

enum { SHORT = 48, CACHED = 1 << 17 }; /* bytes of a piece that is searched again and again; pieces in the cache */

typedef struct {
    Bytes classes;             /* kept alive by `owner` */
    PyObject *owner;
    int pattern;
    int32_t byte_id[256];
    Pairs ranks;               /* a pair's `count` is the rank of its merge */
    VECTOR(int32_t) merged;    /* by rank: the token that it makes */
    int32_t *size;             /* by id: bytes of the token */
    Pieces whole, cache;       /* tokens for whole pieces only; pieces met before */
    VECTOR(int32_t) cached, out;
    List *waiting;             /* by rank: places in the long piece at hand; all empty in between */
    Heap heap;                 /* ranks whose list is not empty, as -count */
} Encoder;

static int32_t rank_of(const Encoder *e, int32_t left, int32_t right) {
    const Pair *pair = left < 0 || right < 0 ? NULL : pair_find(&e->ranks, pair_key(left, right));
    return pair && pair->key ? (int32_t)pair->count : INT32_MAX;
}

/* The lowest rank first, of equal ones the leftmost: look for it until there is none. The ids go to `id`. */
static size_t apply_short(const Encoder *e, Bytes s, size_t n, int32_t *id) {
    int32_t rank[SHORT];
    for (size_t i = 0; i < n; i++) id[i] = e->byte_id[s[i]];
    for (size_t i = 0; i + 1 < n; i++) rank[i] = rank_of(e, id[i], id[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == INT32_MAX) break;
        id[best] = e->merged.at[rank[best]], n--;
        memmove(id + best + 1, id + best + 2, (n - best - 1) * sizeof *id);
        memmove(rank + best, rank + best + 1, (n - best - 1) * sizeof *rank);
        if (best) rank[best - 1] = rank_of(e, id[best - 1], id[best]);
        if (best + 1 < n) rank[best] = rank_of(e, id[best], id[best + 1]);
    }
    return n;
}

/* Let a place wait for its pair's rank to come up. */
static int wait_for_rank(Encoder *e, Row *row, int32_t *rank, int32_t place, int32_t left, int32_t right) {
    rank[place] = rank_of(e, left, right);
    if (rank[place] == INT32_MAX) return 1;
    List *list = e->waiting + rank[place];
    if (list->head < 0 && !heap_push(&e->heap, (Candidate){-(int64_t)rank[place], 0})) return 0;
    list_add(row, list, place);
    return 1;
}

/* The same for a piece of any length: the places wait in a list for each rank, so that the time grows as the length. */
static int apply_long(Encoder *e, Bytes s, size_t n) {
    Row row;
    int32_t *rank = row_memory((n + 2) * sizeof *rank), *size = e->size;
    int good = row_make(&row, n + 2) && rank;
    int32_t *id = row.id;
    if (good) id[0] = id[n + 1] = -1;
    for (size_t k = 0; good && k < n; k++) id[k + 1] = e->byte_id[s[k]];
    for (int32_t k = 1; good && k < (int32_t)n; k++) good = wait_for_rank(e, &row, rank, k, id[k], id[k + 1]);
    if (good) rank[n] = INT32_MAX;
    while (good && e->heap.count) {
        int32_t now = (int32_t)-heap_pop(&e->heap).count, place, sooner = 0;
        while (good && !sooner && (place = e->waiting[now].head) >= 0) {
            int32_t second = place + size[id[place]], next = second + size[id[second]];
            int32_t previous = id[place - 1] < 0 ? -1 : place - size[id[place - 1]];
            if (previous >= 0 && rank[previous] != INT32_MAX) list_remove(&row, e->waiting + rank[previous], previous);
            if (rank[second] != INT32_MAX) list_remove(&row, e->waiting + rank[second], second);
            list_remove(&row, e->waiting + now, place);
            id[place] = id[next - 1] = e->merged.at[now];
            if (previous >= 0) good = wait_for_rank(e, &row, rank, previous, id[previous], id[place]);
            good = good && wait_for_rank(e, &row, rank, place, id[place], id[next]);
            sooner = rank[place] < now || (previous >= 0 && rank[previous] < now);
        }
        if (good && e->waiting[now].head >= 0) good = heap_push(&e->heap, (Candidate){-(int64_t)now, 0});
    }
    for (size_t k = 1; good && k <= n; k += (size_t)size[id[k]]) {
        good = reserve(e->out);
        if (good) e->out.at[e->out.count++] = id[k];
    }
    free(row.id), free(rank);
    return good;
}

/* The ids of a text, into e->out; 0 where memory is out. */
static int encode_text(Encoder *e, const Reader *r) {
    int32_t id[SHORT];
    e->out.count = 0;
    for (size_t i = 0, end; i < r->length; i = end) {
        end = piece_end(r, i, e->pattern);
        Bytes s = r->text + i;
        size_t n = end - i, room = r->length - i;
        if (n > SHORT) {
            const Piece *whole = piece_at(&e->whole, s, n, room, 0);
            if (whole ? !reserve(e->out) : n > INT32_MAX - 2 || !apply_long(e, s, n)) return 0;
            if (whole) e->out.at[e->out.count++] = (int32_t)whole->value;
            continue;
        }
        if (e->cache.count >= CACHED) pieces_free(&e->cache), e->cached.count = 0;
        Piece *piece = piece_at(&e->cache, s, n, room, 1);
        if (!piece) return 0;
        if (!piece->ids) {
            const Piece *whole = piece_at(&e->whole, s, n, room, 0);
            size_t made = whole ? 1 : apply_short(e, s, n, id);
            if (whole) id[0] = (int32_t)whole->value;
            piece->value = made == 1 ? id[0] : (int64_t)e->cached.count;
            for (size_t k = 0; made > 1 && k < made; k++) {
                if (!reserve(e->cached)) return 0;
                e->cached.at[e->cached.count++] = id[k];
            }
            piece->ids = (uint32_t)made;
        }
        while (e->out.count + piece->ids > e->out.room)
            if (!double_room(e->out)) return 0;
        if (piece->ids == 1) e->out.at[e->out.count++] = (int32_t)piece->value;
        else {
            memcpy(e->out.at + e->out.count, e->cached.at + piece->value, piece->ids * sizeof *id);
            e->out.count += piece->ids;
        }
    }
    return 1;
}

/* ---- for Python ---- */

static void counter_free(PyObject *capsule) {
    Pieces *p = PyCapsule_GetPointer(capsule, "quire.counter");
    pieces_free(p), free(p);
}

static PyObject *counter(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    Pieces *p = calloc(1, sizeof *p);
    return p ? PyCapsule_New(p, "quire.counter", counter_free) : PyErr_NoMemory();
}

static PyObject *count(PyObject *self, PyObject *args) {
    PyObject *capsule;
    Py_buffer text, classes;
    int pattern, good;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oy*y*i", &capsule, &text, &classes, &pattern)) return NULL;
    Pieces *p = PyCapsule_GetPointer(capsule, "quire.counter");
    Reader r = {text.buf, classes.buf, (size_t)text.len};
    if (p) {
        Py_BEGIN_ALLOW_THREADS
        good = count_pieces(p, &r, pattern);
        Py_END_ALLOW_THREADS
        if (!good) PyErr_NoMemory();
    }
    PyBuffer_Release(&text), PyBuffer_Release(&classes);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *join(PyObject *self, PyObject *args) {
    PyObject *one, *other;
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", &one, &other)) return NULL;
    Pieces *to = PyCapsule_GetPointer(one, "quire.counter"), *from = PyCapsule_GetPointer(other, "quire.counter");
    if (!to || !from) return NULL;
    for (size_t i = 0; from->slots && i <= from->mask; i++) {
        const Piece *piece = from->slots + i;
        if (!piece->length) continue;
        Piece *sum = piece_at(to, piece_bytes(from, piece), piece->length, piece->length, 1);
        if (!sum) return PyErr_NoMemory();
        sum->value += piece->value;
    }
    Py_RETURN_NONE;
}

static PyObject *train(PyObject *self, PyObject *args) {
    PyObject *capsule, *result;
    Py_ssize_t wanted;
    long long fewest, made;
    (void)self;
    if (!PyArg_ParseTuple(args, "OnL", &capsule, &wanted, &fewest)) return NULL;
    Pieces *p = PyCapsule_GetPointer(capsule, "quire.counter");
    int32_t *merges = p ? malloc((2 * (size_t)wanted + 1) * sizeof *merges) : NULL;
    if (!merges) return p ? PyErr_NoMemory() : NULL;
    Py_BEGIN_ALLOW_THREADS
    made = learn(p, (size_t)wanted, fewest, merges);
    Py_END_ALLOW_THREADS
    result = made < 0 ? PyErr_NoMemory() : PyBytes_FromStringAndSize((char *)merges, made * 2 * sizeof *merges);
    free(merges);
    return result;
}

static void encoder_free(PyObject *capsule) {
    Encoder *e = PyCapsule_GetPointer(capsule, "quire.encoder");
    pieces_free(&e->whole), pieces_free(&e->cache);
    free(e->ranks.slots), free(e->merged.at), free(e->size), free(e->cached.at), free(e->out.at);
    free(e->waiting), free(e->heap.at);
    Py_XDECREF(e->owner);
    free(e);
}

/* Fill in the merges: triples of left id, right id and the id of what they make. 0 where memory is out. */
static int encoder_fill(Encoder *e, const int32_t *merges, size_t count, const Py_buffer *sizes) {
    e->size = malloc((size_t)sizes->len);
    e->waiting = malloc((count + 1) * sizeof *e->waiting);
    if (!e->size || !e->waiting || !pair_at(&e->ranks, pair_key(-1, 1))) return 0; /* a table, if of no merge */
    memcpy(e->size, sizes->buf, (size_t)sizes->len);
    for (size_t rank = 0; rank < count; rank++, merges += 3) {
        Pair *pair = pair_at(&e->ranks, pair_key(merges[0], merges[1]));
        if (!pair || !reserve(e->merged)) return 0;
        pair->count = (int64_t)rank;
        e->merged.at[e->merged.count++] = merges[2];
        e->waiting[rank] = (List){-1, -1};
    }
    return 1;
}

static PyObject *encoder(PyObject *self, PyObject *args) {
    PyObject *classes, *whole, *key, *value, *capsule = NULL;
    Py_buffer bytes, merges, sizes;
    Py_ssize_t at = 0;
    int pattern, good;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*O!y*Si", &bytes, &merges, &PyDict_Type, &whole, &sizes, &classes, &pattern))
        return NULL;
    Encoder *e = calloc(1, sizeof *e);
    if (e && bytes.len == sizeof e->byte_id) {
        memcpy(e->byte_id, bytes.buf, sizeof e->byte_id);
        e->owner = Py_NewRef(classes), e->classes = (Bytes)PyBytes_AS_STRING(classes), e->pattern = pattern;
        capsule = PyCapsule_New(e, "quire.encoder", encoder_free);
        good = capsule && encoder_fill(e, merges.buf, (size_t)merges.len / (3 * sizeof(int32_t)), &sizes);
        while (good && PyDict_Next(whole, &at, &key, &value)) {
            size_t length = (size_t)PyBytes_GET_SIZE(key);
            Piece *piece = piece_at(&e->whole, (Bytes)PyBytes_AS_STRING(key), length, length, 1);
            if ((good = piece != NULL)) piece->value = PyLong_AsLong(value);
        }
        if (!good) Py_CLEAR(capsule);
    } else free(e);
    PyBuffer_Release(&bytes), PyBuffer_Release(&merges), PyBuffer_Release(&sizes);
    return capsule ? capsule : PyErr_NoMemory();
}

static PyObject *encode(PyObject *self, PyObject *args) {
    PyObject *capsule;
    Py_buffer text;
    int good;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oy*", &capsule, &text)) return NULL;
    Encoder *e = PyCapsule_GetPointer(capsule, "quire.encoder");
    if (!e) return PyBuffer_Release(&text), NULL;
    Reader r = {text.buf, e->classes, (size_t)text.len};
    Py_BEGIN_ALLOW_THREADS
    good = encode_text(e, &r);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&text);
    if (!good) return PyErr_NoMemory();
    return PyBytes_FromStringAndSize((char *)e->out.at, (Py_ssize_t)(e->out.count * sizeof *e->out.at));
}

static PyObject *split(PyObject *self, PyObject *args) {
    Py_buffer text, classes;
    int pattern;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*i", &text, &classes, &pattern)) return NULL;
    Reader r = {text.buf, classes.buf, (size_t)text.len};
    PyObject *pieces = PyList_New(0), *piece;
    for (size_t i = 0, end; pieces && i < r.length; i = end) {
        end = piece_end(&r, i, pattern);
        piece = PyBytes_FromStringAndSize((const char *)r.text + i, (Py_ssize_t)(end - i));
        if (!piece || PyList_Append(pieces, piece)) Py_CLEAR(pieces);
        Py_XDECREF(piece);
    }
    PyBuffer_Release(&text), PyBuffer_Release(&classes);
    return pieces;
}

static PyMethodDef methods[] = {
    {"split", split, METH_VARARGS, "split(text, classes, pattern) -> the pieces of text (bytes)"},
    {"counter", counter, METH_NOARGS, "counter() -> an empty count of pieces"},
    {"count", count, METH_VARARGS, "count(counter, text, classes, pattern): count the pieces of text, in one thread"},
    {"join", join, METH_VARARGS, "join(counter, other): add the counts of the other to the first"},
    {"train", train, METH_VARARGS, "train(counter, merges, fewest) -> int32 pairs of ids, as bytes"},
    {"encoder", encoder, METH_VARARGS, "encoder(byte_ids, merges, whole, sizes, classes, pattern) -> an encoder"},
    {"encode", encode, METH_VARARGS, "encode(encoder, text) -> int32 ids, as bytes; an encoder serves one thread"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", "The fast core of byte-level BPE.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void) { return PyModule_Create(&module); }
