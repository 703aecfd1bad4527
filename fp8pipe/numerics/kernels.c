/* FP8 casts for CPUs in a single pass each, so that a cast is cheap compared with a bf16 GEMM.
 *
 * backends.py builds this file on first use with the system's C compiler. reference.py has the same operations in
 * torch, and tests check that both give the same bits. bf16 values are passed as uint16_t. Fast-math must not be
 * enabled, because the code relies on exact rounding.
 *
 * Rounding to a grid with p explicit mantissa bits and smallest exponent e0 adds and subtracts a constant in fp32:
 * adding 1.5 * 2^(23 + e - p) makes the hardware round to a multiple of the grid's step 2^(e - p), to nearest, ties to
 * even, where e is the value's exponent, at least e0 (which covers the subnormals).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

/* Smallest power-of-two scale with which amax fits the grid; NaN for NaN and infinity, which must make the whole row
 * NaN instead of being clamped. Computed from the bit patterns, like power_of_two_scale in grids.py. */
static inline float row_scale(uint32_t amax_bits, float largest, float floor) {
    if (amax_bits >= 0x7f800000u) return NAN;
    const uint32_t least = float_to_bits(floor), bits = amax_bits > least ? amax_bits : least;
    return bits_to_float((bits - float_to_bits(largest) + 0x3fffffffu) & 0x7f800000u);
}

/* out[r, c] = round_to_grid(x[r, c] / s_r) * s_r with a power-of-two scale s_r per row; the result is exact in bf16.
 * x_stride and out_stride are the distances between rows, in elements. */
void fp8pipe_cast_rows_bf16(const uint16_t *x, int64_t x_stride, uint16_t *out, int64_t out_stride, int64_t rows,
                            int64_t cols, int mantissa_bits, int min_exponent, float largest, float floor) {
    const uint32_t floor_bits = (uint32_t)(127 + min_exponent) << 23;
    const uint32_t lift = (uint32_t)(23 - mantissa_bits) << 23;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *from = x + r * x_stride;
        uint16_t *to = out + r * out_stride;
        uint16_t top = 0;
#pragma omp simd reduction(max : top)
        for (int64_t c = 0; c < cols; c++) {
            uint16_t magnitude = from[c] & 0x7fffu;
            top = magnitude > top ? magnitude : top;
        }
        const float scale = row_scale((uint32_t)top << 16, largest, floor), inverse = 1.0f / scale;
#pragma omp simd
        for (int64_t c = 0; c < cols; c++) {
            float v = bits_to_float((uint32_t)from[c] << 16) * inverse;
            uint32_t exponent = float_to_bits(v) & 0x7f800000u;
            exponent = exponent > floor_bits ? exponent : floor_bits;
            float magic = bits_to_float((exponent + lift) | 0x00400000u);
            float q = ((v + magic) - magic) * scale;
            to[c] = (uint16_t)((float_to_bits(q) & 0x7fffffffu) >> 16 | (from[c] & 0x8000u));
        }
    }
}

/* out[i] = decode_e4m3(codes[i]) * scale as bf16, which is exact for a power-of-two scale from 2^-100 to 2^100. NaN
 * codes become NaN. For a normal code, the bits are shifted and the exponent is adjusted, in 16-bit lanes; the seven
 * subnormal magnitudes are looked up, because fp32 arithmetic on such small numbers is slow. */
void fp8pipe_decode_e4m3(const uint8_t *codes, uint16_t *out, int64_t n, float scale) {
    uint16_t small[8];
    for (int i = 0; i < 8; i++) small[i] = (uint16_t)(float_to_bits((float)i * 0x1p-9f * scale) >> 16);
    const uint16_t s1 = small[1], s2 = small[2], s3 = small[3], s4 = small[4], s5 = small[5], s6 = small[6], s7 = small[7];
    const uint16_t exponent = (uint16_t)((float_to_bits(scale) >> 16) - (7u << 7)); /* E4M3's bias is 7 */
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const uint16_t code = codes[i], magnitude = code & 0x7fu;
        uint16_t v = (uint16_t)((magnitude << 4) + exponent);
        v = magnitude == 7 ? s7 : v;
        v = magnitude == 6 ? s6 : v;
        v = magnitude == 5 ? s5 : v;
        v = magnitude == 4 ? s4 : v;
        v = magnitude == 3 ? s3 : v;
        v = magnitude == 2 ? s2 : v;
        v = magnitude == 1 ? s1 : v;
        v = magnitude == 0 ? 0 : v;
        v = magnitude == 0x7f ? 0x7fc0 : v;
        out[i] = (uint16_t)(v | (code & 0x80u) << 8);
    }
}

static inline float decode_code(uint32_t code) {
    uint32_t magnitude = code & 0x7fu;
    float normal = bits_to_float((magnitude << 20) + (120u << 23)), subnormal = (float)(int32_t)magnitude * 0x1p-9f;
    float v = magnitude < 8 ? subnormal : normal;
    v = magnitude == 0x7fu ? NAN : v;
    return bits_to_float(float_to_bits(v) | (code & 0x80u) << 24);
}

/* out[i] = decode_e4m3(codes[i]) as fp32, without a scale. */
void fp8pipe_decode_e4m3_fp32(const uint8_t *codes, float *out, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) out[i] = decode_code(codes[i]);
}

/* The nearest E4M3 code of v, ties to even, saturating; NaN becomes 0x7f. */
static inline uint8_t encode_e4m3(float v) {
    uint32_t sign = float_to_bits(v) >> 24 & 0x80u;
    float magnitude = bits_to_float(float_to_bits(v) & 0x7fffffffu);
    magnitude = magnitude > 448.0f ? 448.0f : magnitude;
    uint32_t exponent = float_to_bits(magnitude) & 0x7f800000u;
    exponent = exponent > (121u << 23) ? exponent : (121u << 23); /* 2^-6, the smallest normal number */
    float magic = bits_to_float((exponent + (20u << 23)) | 0x00400000u);
    float rounded = (magnitude + magic) - magic;
    uint32_t normal = (float_to_bits(rounded) >> 20) - (120u << 3);
    uint32_t subnormal = (uint32_t)(int32_t)(rounded * 512.0f);
    uint32_t code = rounded < 0x1p-6f ? subnormal : normal;
    return (uint8_t)(v != v ? 0x7fu : (sign | code));
}

/* codes[rows[i], c] = encode(decode(codes[rows[i], c]) + update[i, c]), in place: adds an update to `count` rows of a
 * contiguous matrix with `cols` columns. The row indices are distinct. */
void fp8pipe_merge_rows_e4m3(uint8_t *codes, const int64_t *rows, int64_t count, int64_t cols, const float *update) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        uint8_t *row = codes + rows[i] * cols;
        const float *change = update + i * cols;
#pragma omp simd
        for (int64_t c = 0; c < cols; c++) row[c] = encode_e4m3(decode_code(row[c]) + change[c]);
    }
}
