/* The fast core of byte-level BPE: splits UTF-8 text into pieces, counts them, learns merges and applies them.

   It gives the very tokens that the Python beside it gives: splitting as in patterns.py, learning and applying merges
   as in merges.py, which read like the algorithms and are where to begin. Here every step is a few loads and stores:

   - a piece is found by a scan of its bytes, and looked up in a hash table keyed by its first eight bytes;
   - learning keeps, for each pair, the places where it stands, so that a merge touches nothing else;
   - applying merges to a long piece does the same, and to a short one simply looks for the lowest rank again.

   Python objects appear in the last section only, and the interpreter's lock is released around all the work. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "first_bytes() reads the bytes of a word in little-endian order; elsewhere the Python reference serves"
#endif

typedef const uint8_t *Bytes;

/* A vector that doubles. `reserve` makes room for some more elements; it gives 0 where memory is out. */
#define VECTOR(type) struct { type *at; size_t count, room; }
#define reserve(v, more) ((v).count + (more) <= (v).room || \
                          grow(&(v).at, &(v).room, (v).count + (more), sizeof *(v).at))

static int grow(void *at, size_t *room, size_t least, size_t width) { /* at: the address of a pointer, of any type */
    size_t wanted = *room ? 2 * *room : 256;
    void *old, *moved;
    memcpy(&old, at, sizeof old);
    if (wanted < least) wanted = least;
    if (!(moved = realloc(old, wanted * width))) return 0;
    memcpy(at, &moved, sizeof moved), *room = wanted;
    return 1;
}

/* ---- splitting: patterns.py by hand ---- */

enum { OTHER, LETTER, NUMBER, SPACE };
enum { GPT2, CL100K, CL100K_HF, QWEN2, SMOLLM, PATTERNS };

typedef struct { Bytes text, classes; size_t length; } Reader; /* classes: one byte for each code point */

/* The class of the character at i, and its bytes in *size. A byte that begins no valid UTF-8 is a character OTHER. */
static int wide_class_at(const Reader *r, size_t i, size_t *size) {
    Bytes s = r->text + i;
    size_t left = r->length - i;
    uint32_t code = s[0];
    *size = 1;
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

static inline int class_at(const Reader *r, size_t i, size_t *size) { /* most bytes are a character each */
    if (r->text[i] >= 0x80) return wide_class_at(r, i, size);
    *size = 1;
    return r->classes[r->text[i]];
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
    int simple = pattern == GPT2 || pattern == SMOLLM, digits = pattern == QWEN2 || pattern == SMOLLM;
    size_t size, second, last = i, end = contraction(r, i, !simple);
    if (end) return i + end;
    int class = class_at(r, i, &size);
    int follows = i + size < r->length ? class_at(r, i + size, &second) : SPACE;
    if (class == NUMBER && digits) return i + size;
    if (simple) {
        int apart = follows == SPACE || (follows == NUMBER && digits); /* nothing that takes a space before it */
        if (s[i] == ' ' && !apart) return run_end(r, i + 1, follows, SIZE_MAX, &last);
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
    if (end == r->length && (simple || pattern == CL100K)) return end;
    if (!simple)
        for (size_t k = end; k > i; k--)
            if (is_line_end(s[k - 1])) return k;
    if (pattern == SMOLLM && class_at(r, end, &size) == NUMBER) return end; /* as at the end of the text */
    return last > i && end < r->length ? last : end;
}

/* ---- a table of pieces, in the order in which they were first met ---- */

typedef struct { uint64_t first; int64_t value; uint32_t where, length, ids; } Piece;
typedef struct { uint32_t tag, number; } Slot; /* number: of a piece, from 1; 0: an empty slot */
enum { PIECE = 8 }; /* what a piece counts for in `size` besides its bytes, as in pieces.py */
typedef struct { VECTOR(Piece) list; VECTOR(uint8_t) text; Slot *slots; size_t mask, size; } Pieces;

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

static int pieces_resize(Pieces *p) {
    size_t mask = p->slots ? 2 * p->mask + 1 : (1 << 12) - 1;
    Slot *fresh = calloc(mask + 1, sizeof *fresh);
    if (!fresh) return 0;
    for (size_t i = 0, slot; p->slots && i <= p->mask; i++) {
        if (!p->slots[i].number) continue;
        for (slot = p->slots[i].tag & mask; fresh[slot].number; slot = (slot + 1) & mask) {}
        fresh[slot] = p->slots[i];
    }
    free(p->slots);
    p->slots = fresh, p->mask = mask;
    return 1;
}

static void pieces_free(Pieces *p) {
    free(p->list.at), free(p->text.at), free(p->slots);
    memset(p, 0, sizeof *p);
}

static Bytes piece_bytes(const Pieces *p, const Piece *piece) {
    return piece->length > 8 ? p->text.at + piece->where : (Bytes)&piece->first;
}

/* The entry of a piece, made (value 0) where there is none; NULL where memory is out. `room` as in first_bytes.
   With `make` 0 nothing is made: NULL where there is none. */
static Piece *piece_at(Pieces *p, Bytes s, size_t length, size_t room, int make) {
    if (!make && !p->list.count) return NULL;
    if (p->list.count * 2 >= p->mask && !pieces_resize(p)) return NULL;
    uint64_t first = first_bytes(s, length, room), hash = mix(first ^ length);
    for (size_t k = 8; k < length; k += 8) hash = mix(hash ^ first_bytes(s + k, length - k, room - k));
    size_t slot = hash & p->mask;
    for (; p->slots[slot].number; slot = (slot + 1) & p->mask) {
        Piece *piece = p->list.at + p->slots[slot].number - 1;
        if (p->slots[slot].tag == (uint32_t)hash && piece->first == first && piece->length == length &&
            (length <= 8 || !memcmp(p->text.at + piece->where + 8, s + 8, length - 8)))
            return piece;
    }
    size_t kept = length > 8 ? length : 0, where = p->text.count; /* short ones are in `first` already */
    if (!make || where + length > UINT32_MAX || !reserve(p->list, 1) || !reserve(p->text, kept)) return NULL;
    if (kept) memcpy(p->text.at + where, s, kept);
    p->text.count += kept, p->size += length + PIECE;
    p->list.at[p->list.count++] = (Piece){.first = first, .where = (uint32_t)where, .length = (uint32_t)length};
    p->slots[slot] = (Slot){(uint32_t)hash, (uint32_t)p->list.count};
    return p->list.at + p->list.count - 1;
}

static int count_pieces(Pieces *p, const Reader *r, int pattern, size_t longest) {
    for (size_t i = 0, end, length; i < r->length;)
        for (end = piece_end(r, i, pattern); i < end; i += length) {
            length = end - i < longest ? end - i : longest;
            Piece *piece = piece_at(p, r->text + i, length, r->length - i, 1);
            if (!piece) return 0;
            piece->value++;
        }
    return 1;
}

static int by_count(const void *a, const void *b) { /* the most frequent first, of equally frequent ones the first */
    const Piece *one = a, *other = b;
    if (one->value != other->value) return one->value > other->value ? -1 : 1;
    return one->ids < other->ids ? -1 : 1;
}

/* Where the pieces take more than `room`: only the most frequent, as many as half of it holds. */
static int pieces_prune(Pieces *p, size_t room) {
    Pieces kept = {0};
    if (p->size <= room) return 1;
    for (size_t i = 0; i < p->list.count; i++) p->list.at[i].ids = (uint32_t)i;
    qsort(p->list.at, p->list.count, sizeof *p->list.at, by_count);
    for (size_t i = 0; i < p->list.count; i++) {
        const Piece *piece = p->list.at + i;
        if (kept.size + piece->length + PIECE > room / 2) break;
        Piece *copy = piece_at(&kept, piece_bytes(p, piece), piece->length, piece->length, 1);
        if (!copy) return pieces_free(&kept), 0;
        copy->value = piece->value;
    }
    pieces_free(p);
    *p = kept;
    return 1;
}

/* Add the counts of `from`, and empty it. */
static int pieces_join(Pieces *to, Pieces *from) {
    for (size_t i = 0; i < from->list.count; i++) {
        const Piece *piece = from->list.at + i;
        Piece *sum = piece_at(to, piece_bytes(from, piece), piece->length, piece->length, 1);
        if (!sum) return 0;
        sum->value += piece->value;
    }
    if (from->slots) memset(from->slots, 0, (from->mask + 1) * sizeof *from->slots);
    from->list.count = from->text.count = from->size = 0;
    return 1;
}

/* ---- a table of pairs ---- */

/* key: left id + 1, right id; count: or rank. Pairs that have become rarer than `fewest` go when the table grows. */
typedef struct { uint64_t key; int64_t count; uint32_t first, places; } Pair;
typedef struct { Pair *slots; size_t mask, count; int64_t fewest; } Pairs;

static uint64_t pair_key(int32_t left, int32_t right) { return (uint64_t)(left + 1) << 32 | (uint32_t)right; }

static Pair *pair_find(const Pairs *p, uint64_t key) { /* its slot, or the empty one (key 0) where it would be */
    size_t slot = (mix(key) ^ key) & p->mask;
    while (p->slots[slot].key && p->slots[slot].key != key) slot = (slot + 1) & p->mask;
    return p->slots + slot;
}

static Pair *pair_at(Pairs *p, uint64_t key) { /* made where there is none; NULL where memory is out */
    if (p->count * 2 >= p->mask) {
        size_t old_mask = p->mask, alive = 0;
        Pair *old = p->slots;
        for (size_t i = 0; old && i <= old_mask; i++) alive += old[i].key && old[i].count >= p->fewest;
        size_t slots = !old ? 1 << 12 : alive * 4 > old_mask ? 2 * (old_mask + 1) : old_mask + 1;
        Pair *fresh = calloc(slots, sizeof *fresh);
        if (!fresh) return NULL;
        p->slots = fresh, p->mask = slots - 1, p->count = alive;
        for (size_t i = 0; old && i <= old_mask; i++)
            if (old[i].key && old[i].count >= p->fewest) *pair_find(p, old[i].key) = old[i];
        free(old);
    }
    Pair *pair = pair_find(p, key);
    if (!pair->key) *pair = (Pair){.key = key}, p->count++;
    return pair;
}

/* ---- a heap: the largest count first, of equal ones the smallest key ---- */

typedef struct { int64_t count; uint64_t key; } Candidate;
typedef VECTOR(Candidate) Heap;

static int precedes(Candidate a, Candidate b) { return a.count != b.count ? a.count > b.count : a.key < b.key; }

static int heap_push(Heap *h, Candidate c) {
    if (!reserve(*h, 1)) return 0;
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

/* All pieces in one row of bytes, -1 between them. A token's id stands at its first and its last byte; at what was the
   first byte of a token that was merged with the one before it stands GONE. So a place where a pair once stood can be
   told from one where it still stands, and no list of places needs to be kept up to date.

   All places of a pair come up in one step, that which makes the later one of its two tokens; afterwards its count only
   falls. So a pair that is too rare after that step is never looked at again, and each list is written once. */
enum { GONE = -2 };
typedef struct { int32_t id, piece; } Byte;
typedef struct { int32_t neighbour, place; } Met;
typedef struct { int64_t lost, gained; uint32_t first, places; } Change; /* of the pair of a token and its neighbour */
typedef VECTOR(Met) Mets;

typedef struct {
    Byte *row;
    int64_t *weight;           /* of each piece: how often it occurs */
    int64_t fewest;
    Pairs pairs;
    VECTOR(int32_t) places;    /* of a pair: from its `first` on, ascending */
    VECTOR(int32_t) size;      /* bytes of each token */
    VECTOR(int32_t) merges;    /* pairs of ids */
    VECTOR(Change) before;     /* by neighbour, for the step at hand; all zero in between */
    VECTOR(Change) after;
    Mets met_before, met_after;
    Heap heap;
} Learner;

/* Take note of a new pair, if it is frequent enough, and make room for its places. */
static int pair_new(Learner *l, int32_t left, int32_t right, Change *change) {
    if (change->gained < l->fewest) return 1;
    uint64_t key = pair_key(left, right);
    Pair *pair = pair_at(&l->pairs, key);
    if (!pair || !reserve(l->places, change->places)) return 0;
    change->first = (uint32_t)l->places.count;
    *pair = (Pair){key, change->gained, change->first, change->places};
    l->places.count += change->places;
    return heap_push(&l->heap, (Candidate){change->gained, key});
}

static void pair_lose(Learner *l, int32_t left, int32_t right, int64_t lost) {
    Pair *pair = pair_find(&l->pairs, pair_key(left, right));
    if (pair->key) pair->count -= lost;
}

/* The pairs of bytes: a step like any other, but for a pair of bytes instead of a neighbour. */
static int learner_start(Learner *l, size_t length) {
    Change *change = calloc(1 << 16, sizeof *change);
    const Byte *row = l->row;
    int good = change != NULL;
    for (size_t k = 1; good && k + 1 < length; k++)
        if (row[k].id >= 0 && row[k + 1].id >= 0) {
            Change *c = change + (row[k].id << 8 | row[k + 1].id);
            c->gained += l->weight[row[k].piece], c->places++;
        }
    for (int32_t pair = 0; good && pair < 1 << 16; pair++) good = pair_new(l, pair >> 8, pair & 255, change + pair);
    for (size_t k = 1; good && k + 1 < length; k++)
        if (row[k].id >= 0 && row[k + 1].id >= 0) {
            Change *c = change + (row[k].id << 8 | row[k + 1].id);
            if (c->gained >= l->fewest) l->places.at[c->first++] = (int32_t)k;
        }
    free(change);
    return good;
}

/* Make token `merged` wherever `left` is followed by `right`, from the first place to the last. */
static int merge_everywhere(Learner *l, int32_t left, int32_t right, int32_t merged) {
    Pair pair = *pair_find(&l->pairs, pair_key(left, right));
    Byte *row = l->row;
    const int32_t *size = l->size.at;
    Change *before = l->before.at, *after = l->after.at;
    if (!reserve(l->met_before, pair.places) || !reserve(l->met_after, pair.places)) return 0;
    Met *met_before = l->met_before.at, *met_after = l->met_after.at;
    for (uint32_t i = 0; i < pair.places; i++) {
        int32_t place = l->places.at[pair.first + i], second = place + size[left], next = second + size[right];
        if (row[place].id != left || row[second].id != right) continue;
        int64_t weight = l->weight[row[place].piece];
        int32_t x = row[place - 1].id, y = row[next].id;
        row[second].id = GONE, row[place].id = row[next - 1].id = merged;
        if (x >= 0) {
            *met_before++ = (Met){x, place - size[x]};
            before[x].gained += weight, before[x].places++;
            if (x != merged) before[x].lost += weight;
            else after[left].gained -= weight; /* what it was given a moment ago */
        }
        if (y >= 0) {
            *met_after++ = (Met){y, place};
            after[y].gained += weight, after[y].places++, after[y].lost += weight;
        }
    }
    l->met_before.count = (size_t)(met_before - l->met_before.at);
    l->met_after.count = (size_t)(met_after - l->met_after.at);
    return 1;
}

/* The pairs of the new token with its neighbours, and how many the old pairs have lost. */
static int count_again(Learner *l, int32_t left, int32_t right, int32_t merged) {
    const Mets *met[2] = {&l->met_before, &l->met_after};
    for (int side = 0; side < 2; side++) {
        Change *changes = side ? l->after.at : l->before.at;
        for (size_t i = 0; i < met[side]->count; i++) {
            int32_t other = met[side]->at[i].neighbour, place = met[side]->at[i].place;
            Change *change = changes + other;
            if (change->places) { /* met for the first time */
                side ? pair_lose(l, right, other, change->lost) : pair_lose(l, other, left, change->lost);
                if (!(side ? pair_new(l, merged, other, change) : pair_new(l, other, merged, change))) return 0;
                change->places = 0;
            }
            if (change->gained >= l->fewest) l->places.at[change->first++] = place;
        }
        for (size_t i = 0; i < met[side]->count; i++) changes[met[side]->at[i].neighbour] = (Change){0};
    }
    return 1;
}

static int token_new(Learner *l, int32_t size) {
    if (!reserve(l->size, 1) || !reserve(l->before, 1) || !reserve(l->after, 1)) return 0;
    l->size.at[l->size.count++] = size;
    l->before.at[l->before.count++] = l->after.at[l->after.count++] = (Change){0};
    return 1;
}

/* Lay the pieces out in one row; they are freed. */
static int learner_fill(Learner *l, Pieces *p, size_t length) {
    l->row = malloc(length * sizeof *l->row), l->weight = malloc((p->list.count + 1) * sizeof *l->weight);
    if (!l->row || !l->weight) return 0;
    Byte *at = l->row;
    *at++ = (Byte){-1, -1};
    for (size_t i = 0; i < p->list.count; i++) {
        const Piece *piece = p->list.at + i;
        l->weight[i] = piece->value;
        if (piece->length < 2) continue;
        Bytes s = piece_bytes(p, piece);
        for (uint32_t k = 0; k < piece->length; k++) *at++ = (Byte){s[k], (int32_t)i};
        *at++ = (Byte){-1, -1};
    }
    pieces_free(p);
    for (int byte = 0; byte < 256; byte++)
        if (!token_new(l, 1)) return 0;
    return learner_start(l, length);
}

/* Up to `wanted` merges into l->merges; 0 where memory is out. Merge i makes 256 + i. */
static int learn(Learner *l, Pieces *p, size_t wanted) {
    size_t length = 1;
    for (size_t i = 0; i < p->list.count; i++)
        if (p->list.at[i].length >= 2) length += p->list.at[i].length + 1;
    if (length > INT32_MAX / 3) return 0; /* gigabytes of distinct pieces: pruned counts are nowhere near */
    if (!learner_fill(l, p, length)) return 0;
    while (l->merges.count < 2 * wanted && l->heap.count) {
        Candidate best = heap_pop(&l->heap);
        int64_t count = pair_find(&l->pairs, best.key)->count;
        int32_t left = (int32_t)(best.key >> 32) - 1, right = (int32_t)(uint32_t)best.key, merged = l->size.count;
        if (count < l->fewest) continue;
        if (count != best.count) { /* it has lost places since it was put here */
            if (!heap_push(&l->heap, (Candidate){count, best.key})) return 0;
            continue;
        }
        if (!reserve(l->merges, 2) || !token_new(l, l->size.at[left] + l->size.at[right])) return 0;
        l->merges.at[l->merges.count++] = left, l->merges.at[l->merges.count++] = right;
        if (!merge_everywhere(l, left, right, merged) || !count_again(l, left, right, merged)) return 0;
        pair_find(&l->pairs, best.key)->count = 0;
    }
    return 1;
}

static void learner_free(Learner *l) {
    free(l->row), free(l->weight), free(l->pairs.slots), free(l->places.at), free(l->size.at), free(l->merges.at);
    free(l->before.at), free(l->after.at), free(l->met_before.at), free(l->met_after.at), free(l->heap.at);
}

/* ---- applying merges ---- */

enum { SHORT = 48, CACHED = 1 << 17 }; /* bytes of a piece that is searched again and again; pieces in the cache */
#ifndef WINDOW
#define WINDOW (1 << 14) /* bytes of a long piece at once: what the cache of a core holds */
#endif

/* Of a long piece: the tokens over its bytes, each token's id at its first and its last byte. A place, where a token
   begins, waits in the list of the rank of the pair that it makes with the next token. Where a list ends, `before` of
   its first place, `after` of its last and both of an empty one, stands ~rank. */
typedef struct { int32_t id, before, after; } Place;
typedef struct { int32_t head, tail; } List;
enum { NO_RANK = INT32_MAX };

typedef struct {
    Bytes classes;             /* kept alive by `owner` */
    PyObject *owner;
    int pattern;
    int32_t byte_id[256];
    Pairs ranks;               /* a pair's `count` is the rank of its merge */
    VECTOR(int32_t) merged;    /* by rank: the token that it makes */
    int32_t *size;             /* by id: bytes of the token */
    Pieces whole, cache;       /* tokens for whole pieces only; pieces met before */
    VECTOR(int32_t) cached;    /* ids of the pieces met before */
    VECTOR(Place) row;
    List *waiting;             /* by rank; all empty in between */
    Heap heap;                 /* ranks whose list is not empty, as -count */
} Encoder;

static int32_t rank_of(const Encoder *e, int32_t left, int32_t right) {
    const Pair *pair = left < 0 || right < 0 ? NULL : pair_find(&e->ranks, pair_key(left, right));
    return pair && pair->key ? (int32_t)pair->count : NO_RANK;
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
        if (rank[best] == NO_RANK) break;
        id[best] = e->merged.at[rank[best]], n--;
        memmove(id + best + 1, id + best + 2, (n - best - 1) * sizeof *id);
        memmove(rank + best, rank + best + 1, (n - best - 1) * sizeof *rank);
        if (best) rank[best - 1] = rank_of(e, id[best - 1], id[best]);
        if (best + 1 < n) rank[best] = rank_of(e, id[best], id[best + 1]);
    }
    return n;
}

/* Let a place wait for the rank of its pair, which is given: in order of place, nearly always at the end. */
static int wait_for(Encoder *e, Place *row, int32_t place, int32_t rank) {
    row[place].before = row[place].after = ~rank;
    if (rank == NO_RANK) return 1;
    List *list = e->waiting + rank;
    if (list->head < 0 && !heap_push(&e->heap, (Candidate){-(int64_t)rank, 0})) return 0;
    int32_t before = list->tail;
    while (before > place) before = row[before].before;
    int32_t after = before < 0 ? list->head : row[before].after;
    row[place].before = before, row[place].after = after;
    *(before < 0 ? &list->head : &row[before].after) = place;
    *(after < 0 ? &list->tail : &row[after].before) = place;
    return 1;
}

static void wait_no_more(Encoder *e, Place *row, int32_t place) {
    int32_t before = row[place].before, after = row[place].after;
    if (before == ~NO_RANK) return;
    *(before < 0 ? &e->waiting[~before].head : &row[before].after) = after;
    *(after < 0 ? &e->waiting[~after].tail : &row[after].before) = before;
}

/* The same in a time that grows as the length does: places wait in a list for each rank. The ids stay in e->row. */
static int apply_window(Encoder *e, Bytes s, size_t n) {
    if (n > INT32_MAX - 2 || !reserve(e->row, n + 2)) return 0;
    Place *row = e->row.at;
    const int32_t *size = e->size;
    row[0].id = row[n + 1].id = -1;
    for (size_t k = 1; k <= n; k++) row[k].id = e->byte_id[s[k - 1]];
    for (int32_t k = 1; k <= (int32_t)n; k++)
        if (!wait_for(e, row, k, rank_of(e, row[k].id, row[k + 1].id))) return 0;
    while (e->heap.count) {
        int32_t now = (int32_t)-heap_pop(&e->heap).count, place, sooner = 0;
        while (!sooner && (place = e->waiting[now].head) >= 0) {
            int32_t second = place + size[row[place].id], next = second + size[row[second].id];
            int32_t previous = row[place - 1].id < 0 ? 0 : place - size[row[place - 1].id];
            if (previous) wait_no_more(e, row, previous);
            wait_no_more(e, row, second), wait_no_more(e, row, place);
            row[place].id = row[next - 1].id = e->merged.at[now];
            int32_t left = rank_of(e, row[previous].id, row[place].id), right = rank_of(e, row[place].id, row[next].id);
            if ((previous && !wait_for(e, row, previous, left)) || !wait_for(e, row, place, right)) return 0;
            sooner = left < now || right < now; /* no vocabulary that was learned has this */
        }
        if (e->waiting[now].head >= 0 && !heap_push(&e->heap, (Candidate){-(int64_t)now, 0})) return 0;
    }
    return 1;
}

/* A piece of any length, in windows. Where tokens a and b are what "ab" becomes, no merge ever reaches across their
   border: before the first one that did, both sides would change as they do alone, so that it would come up in "ab"
   too. Two rows that meet in such a border are what all of it becomes. Where they do not, larger windows. */
static int apply_long(Encoder *e, Bytes s, size_t n, int32_t *out, size_t *made) {
    size_t from = 0, window = WINDOW, count = 0, begin, fits, k;
    for (;; window *= 2, from = count = 0)
        do {
            size_t length = n - from < window ? n - from : window, most = from + length;
            if (!apply_window(e, s + from, length)) return 0;
            if (most < n) most -= length / 8; /* the last tokens would often change with what follows */
            for (k = 1, begin = count; k <= length && from + (size_t)e->size[e->row.at[k].id] <= most; count++) {
                out[count] = e->row.at[k].id;
                k += (size_t)e->size[out[count]], from += (size_t)e->size[out[count]];
            }
            fits = count > begin;
            if (begin && fits) {
                size_t a = (size_t)e->size[out[begin - 1]], b = (size_t)e->size[out[begin]];
                if (!apply_window(e, s + from - (k - 1) - a, a + b)) return 0;
                fits = e->row.at[1].id == out[begin - 1] && e->row.at[1 + a].id == out[begin];
            }
            if (fits && from == n) return *made = count, 1;
        } while (fits);
}

/* The ids of a text, at most as many as it has bytes, into `out`; their number into *made; 0 where memory is out. */
static int encode_text(Encoder *e, const Reader *r, int32_t *out, size_t *made) {
    int32_t *start = out;
    for (size_t i = 0, end, count; i < r->length; i = end, out += count) {
        end = piece_end(r, i, e->pattern);
        Bytes s = r->text + i;
        size_t n = end - i, room = r->length - i;
        Piece *piece = n > SHORT ? NULL : piece_at(&e->cache, s, n, room, 1);
        if (n <= SHORT && !piece) return 0;
        if (piece && piece->ids) { /* met before */
            count = piece->ids;
            if (count == 1) *out = (int32_t)piece->value;
            else memcpy(out, e->cached.at + piece->value, count * sizeof *out);
            continue;
        }
        const Piece *whole = piece_at(&e->whole, s, n, room, 0);
        if (whole) *out = (int32_t)whole->value, count = 1;
        else if (piece) count = apply_short(e, s, n, out);
        else if (!apply_long(e, s, n, out, &count)) return 0;
        if (!piece) continue;
        piece->ids = (uint32_t)count, piece->value = count == 1 ? *out : (int64_t)e->cached.count;
        if (count > 1) {
            if (!reserve(e->cached, count)) return 0;
            memcpy(e->cached.at + e->cached.count, out, count * sizeof *out), e->cached.count += count;
        }
        if (e->cache.list.count >= CACHED) pieces_free(&e->cache), e->cached.count = 0;
    }
    *made = (size_t)(out - start);
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
    Py_ssize_t longest;
    int pattern, good;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oy*y*in", &capsule, &text, &classes, &pattern, &longest)) return NULL;
    Pieces *p = PyCapsule_GetPointer(capsule, "quire.counter");
    Reader r = {text.buf, classes.buf, (size_t)text.len};
    if (p) {
        Py_BEGIN_ALLOW_THREADS
        good = count_pieces(p, &r, pattern, (size_t)longest);
        Py_END_ALLOW_THREADS
        if (!good) PyErr_NoMemory();
    }
    PyBuffer_Release(&text), PyBuffer_Release(&classes);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *join(PyObject *self, PyObject *args) {
    PyObject *one, *other;
    Py_ssize_t room;
    int good;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOn", &one, &other, &room)) return NULL;
    Pieces *to = PyCapsule_GetPointer(one, "quire.counter"), *from = PyCapsule_GetPointer(other, "quire.counter");
    if (!to || !from) return NULL;
    Py_BEGIN_ALLOW_THREADS
    good = pieces_join(to, from) && pieces_prune(to, (size_t)room);
    Py_END_ALLOW_THREADS
    return good ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyObject *held(PyObject *self, PyObject *capsule) {
    const Pieces *p = PyCapsule_GetPointer(capsule, "quire.counter");
    (void)self;
    return p ? PyLong_FromSize_t(p->list.room * sizeof(Piece) + p->text.room +
                                 (p->slots ? p->mask + 1 : 0) * sizeof(Slot)) : NULL;
}

static PyObject *train(PyObject *self, PyObject *args) {
    PyObject *capsule, *result;
    Py_ssize_t wanted;
    long long fewest;
    int good;
    (void)self;
    if (!PyArg_ParseTuple(args, "OnL", &capsule, &wanted, &fewest)) return NULL;
    Pieces *p = PyCapsule_GetPointer(capsule, "quire.counter");
    if (!p) return NULL;
    Learner l = {.fewest = fewest, .pairs.fewest = fewest};
    Py_BEGIN_ALLOW_THREADS
    good = learn(&l, p, (size_t)wanted);
    Py_END_ALLOW_THREADS
    Py_ssize_t size = (Py_ssize_t)(l.merges.count * sizeof *l.merges.at);
    result = good ? PyBytes_FromStringAndSize((char *)l.merges.at, size) : PyErr_NoMemory();
    learner_free(&l);
    return result;
}

static void encoder_free(PyObject *capsule) {
    Encoder *e = PyCapsule_GetPointer(capsule, "quire.encoder");
    pieces_free(&e->whole), pieces_free(&e->cache);
    free(e->ranks.slots), free(e->merged.at), free(e->size), free(e->cached.at);
    free(e->row.at), free(e->waiting), free(e->heap.at);
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
        if (!pair || !reserve(e->merged, 1)) return 0;
        pair->count = (int64_t)rank;
        e->merged.at[e->merged.count++] = merges[2];
        e->waiting[rank] = (List){~(int32_t)rank, ~(int32_t)rank};
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
    Py_buffer text, ids;
    size_t made = 0;
    int good;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oy*w*", &capsule, &text, &ids)) return NULL;
    Encoder *e = PyCapsule_GetPointer(capsule, "quire.encoder");
    if (e && (size_t)ids.len < (size_t)text.len * sizeof(int32_t)) PyErr_SetString(PyExc_ValueError, "too few ids");
    else if (e) {
        Reader r = {text.buf, e->classes, (size_t)text.len};
        Py_BEGIN_ALLOW_THREADS
        good = encode_text(e, &r, ids.buf, &made);
        Py_END_ALLOW_THREADS
        if (!good) PyErr_NoMemory();
    }
    PyBuffer_Release(&text), PyBuffer_Release(&ids);
    return PyErr_Occurred() ? NULL : PyLong_FromSize_t(made);
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
    {"count", count, METH_VARARGS, "count(counter, text, classes, pattern, longest): count pieces, in one thread"},
    {"join", join, METH_VARARGS, "join(counter, other, room): move the counts of the other; keep what has room"},
    {"train", train, METH_VARARGS, "train(counter, merges, fewest) -> int32 pairs of ids; empties the counter"},
    {"held", held, METH_O, "held(counter) -> bytes of memory that a counter holds"},
    {"encoder", encoder, METH_VARARGS, "encoder(byte_ids, merges, whole, sizes, classes, pattern) -> an encoder"},
    {"encode", encode, METH_VARARGS, "encode(encoder, text, ids) -> how many int32 ids it wrote, in one thread"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", "The fast core of byte-level BPE.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void) {
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "PATTERNS", PATTERNS)) Py_CLEAR(made);
    return made;
}
