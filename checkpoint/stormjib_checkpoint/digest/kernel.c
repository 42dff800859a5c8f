/* Partial digests (FORMAT.md, section 12) at the speed of memory. `definition.py` says what is computed, `twin.py` says it in numpy.

   Plain C without Python: loaded by ctypes, which gives the GIL away while it runs. Knows little-endian machines only. */

#include <stddef.h>
#include <stdint.h>

#define BLOCK 1024
#define GOLDEN 0x9E3779B97F4A7C15u
#define FAR (UINT64_C(1) << 63)

/* One version for each generation of processors, chosen when the library is loaded: only gcc for glibc on x86-64 can do that. */
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* Words at any address, whatever was written there as what. */
typedef uint8_t word1;
typedef uint16_t word2 __attribute__((aligned(1), may_alias));
typedef uint32_t word4 __attribute__((aligned(1), may_alias));

static uint64_t within[BLOCK];

static uint64_t mix(uint64_t z)
{
    z *= GOLDEN;
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

__attribute__((constructor)) static void fill(void)
{
    for (uint64_t a = 0; a < BLOCK; a++)
        within[a] = mix(a) | 1;
}

#define DOT(word)                                                                                     \
    FOR_EACH_PROCESSOR static uint64_t dot_##word(const word *words, const uint64_t *weights, size_t count) \
    {                                                                                                 \
        uint64_t sum = 0;                                                                             \
        for (size_t i = 0; i < count; i++)                                                            \
            sum += words[i] * weights[i];                                                             \
        return sum;                                                                                   \
    }
DOT(word1)
DOT(word2)
DOT(word4)

static uint64_t dot(const char *words, size_t width, const uint64_t *weights, size_t count)
{
    if (width == 1)
        return dot_word1((const word1 *)words, weights, count);
    if (width == 2)
        return dot_word2((const word2 *)words, weights, count);
    return dot_word4((const word4 *)words, weights, count);
}

/* Words that lie one after the other in memory and in the atom, the first of them at `position`. */
static uint64_t run(const char *words, size_t width, uint64_t position, uint64_t count)
{
    uint64_t sum = 0;
    while (count) {
        uint64_t a = position % BLOCK, now = BLOCK - a < count ? BLOCK - a : count;
        sum += (mix(FAR + position / BLOCK) | 1) * dot(words, width, within + a, now);
        words += now * width;
        position += now;
        count -= now;
    }
    return sum;
}

/* The partial digest of `count` elements of a box, from its element number `first` on (row-major), which lie one after the other from
   `data` on. An element is `words` words of `width` bytes. The box has `dims` >= 1 sides, `sizes` elements long, and the steps along them
   are `strides` elements of the atom; the last is 1. `base` is the index of its first element in the atom. */
uint64_t stormjib_digest_1(const char *data, uint64_t width, uint64_t words, uint64_t dims, const uint64_t *sizes,
                           const uint64_t *strides, uint64_t base, uint64_t first, uint64_t count)
{
    if (!count)
        return 0;
    uint64_t last = dims - 1, length = sizes[last], at[dims], index = base, row = first / length, sum = 0;
    at[last] = first % length;
    for (uint64_t d = last; d-- > 0;) {
        at[d] = row % sizes[d];
        row /= sizes[d];
        index += at[d] * strides[d];
    }
    for (;;) {
        uint64_t now = length - at[last] < count ? length - at[last] : count;
        sum += run(data, width, (index + at[last]) * words, now * words);
        if (!(count -= now))
            return sum;
        data += now * words * width;
        at[last] = 0;
        for (uint64_t d = last; d-- > 0;) {
            index += strides[d];
            if (++at[d] < sizes[d])
                break;
            index -= sizes[d] * strides[d];
            at[d] = 0;
        }
    }
}
