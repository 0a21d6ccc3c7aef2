#include "pack.h"

#include <cstring>

#include "half.h"

namespace pagemill {

static size_t chunk_bytes(Format format) {
    switch (format) {
        case Format::q4_0:
        case Format::q4_0_tiles: return 512 + 64;
        case Format::q4_1:
        case Format::q4_1_tiles: return 512 + 128;
        case Format::q8_0:
        case Format::q8_0_tiles: return 1024 + 64;
        default: return 0;
    }
}

size_t panel_bytes(Format format, int k) {
    switch (format) {
        case Format::f32: return size_t(k) * kPanel * 4;
        case Format::f16: return size_t(k) * kPanel * 2;
        case Format::bf16: return size_t((k + 1) / 2) * 2 * kPanel * 2;
        case Format::i8_rotated: return size_t(k + 4) * kPanel;
        default: return size_t(k / kGroup) * chunk_bytes(format);
    }
}

size_t source_row_bytes(Format format, int k) {
    switch (format) {
        case Format::f32: return size_t(k) * 4;
        case Format::f16:
        case Format::bf16: return size_t(k) * 2;
        case Format::q4_0:
        case Format::q4_0_tiles: return size_t(k / kGroup) * 18;
        case Format::q4_1:
        case Format::q4_1_tiles: return size_t(k / kGroup) * 20;
        case Format::q8_0:
        case Format::q8_0_tiles: return size_t(k / kGroup) * 34;
        case Format::i8_rotated: return size_t(k) + 4;
    }
    return 0;
}

static void pack_nibbles(const uint8_t* quants, int column, uint8_t* chunk) {
    // The checkpoint's byte i holds k = i (low) and k = 16 + i (high), which is the packed order as well.
    for (int j = 0; j < 4; j++)
        std::memcpy(chunk + 64 * (2 * j + column / 16) + 4 * (column % 16), quants + 4 * j, 4);
}

static bool is_eight_bits(Format format) { return format == Format::q8_0 || format == Format::q8_0_tiles; }
static bool has_minimum(Format format) { return format == Format::q4_1 || format == Format::q4_1_tiles; }

// A column's nibble at k within a group of the tile layouts.
static void put_code(uint8_t* chunk, int column, int k, int code) {
    uint8_t& byte = chunk[64 * (column / 4) + 2 * k + column % 4 / 2];
    const int shift = 4 * (column % 2);
    byte = uint8_t((byte & ~(15 << shift)) | code << shift);
}
static int code_at(const uint8_t* chunk, int column, int k) {
    return chunk[64 * (column / 4) + 2 * k + column % 4 / 2] >> 4 * (column % 2) & 15;
}

static void pack_group_row(Format format, const uint8_t* row, int k, int column, uint8_t* panel) {
    const size_t chunk = chunk_bytes(format), block = source_row_bytes(format, kGroup);
    for (int g = 0; g < k / kGroup; g++, row += block, panel += chunk) {
        if (format == Format::q8_0_tiles) std::memcpy(panel + 32 * column, row + 2, kGroup);
        if (format == Format::q8_0)
            for (int j = 0; j < kGroup; j++)
                panel[(j / 4) * 128 + column * 4 + j % 4] = uint8_t(int8_t(row[2 + j]) + 128);
        if (is_eight_bits(format)) {
            std::memcpy(panel + 1024 + 2 * column, row, 2);
            continue;
        }
        const uint8_t* quants = row + (has_minimum(format) ? 4 : 2);
        if (format == Format::q4_0 || format == Format::q4_1) pack_nibbles(quants, column, panel);
        else
            for (int j = 0; j < 16; j++) {
                put_code(panel, column, j, quants[j] & 15);
                put_code(panel, column, 16 + j, quants[j] >> 4);
            }
        std::memcpy(panel + 512 + 2 * column, row, 2);
        if (has_minimum(format)) std::memcpy(panel + 576 + 2 * column, row + 2, 2);
    }
}

void pack_rows(Format format, const uint8_t* rows, int n, int k, int column0, uint8_t* packed) {
    const size_t stride = panel_bytes(format, k), row_bytes = source_row_bytes(format, k);
    for (int i = 0; i < n; i++, rows += row_bytes) {
        const int column = (column0 + i) % kPanel;
        uint8_t* panel = packed + size_t((column0 + i) / kPanel) * stride;
        if (format == Format::f32) {
            for (int j = 0; j < k; j++) std::memcpy(panel + (size_t(j) * kPanel + column) * 4, rows + size_t(j) * 4, 4);
        } else if (format == Format::f16) {
            for (int j = 0; j < k; j++) std::memcpy(panel + (size_t(j) * kPanel + column) * 2, rows + size_t(j) * 2, 2);
        } else if (format == Format::bf16) {
            for (int j = 0; j < k; j++)
                std::memcpy(panel + (size_t(j / 2) * 2 * kPanel + column * 2 + j % 2) * 2, rows + size_t(j) * 2, 2);
        } else if (format == Format::i8_rotated) {
            for (int j = 0; j < k; j++) panel[(size_t(j / 4) * kPanel + size_t(column)) * 4 + size_t(j % 4)] = uint8_t(rows[4 + j] ^ 0x80);
            std::memcpy(panel + size_t(k) * kPanel + 4 * column, rows, 4);
        } else {
            pack_group_row(format, rows, k, column, panel);
        }
    }
}

static float half_at(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return f16_to_f32(h);
}

static void unpack_group(Format format, const uint8_t* chunk, int column, float* out) {
    if (is_eight_bits(format)) {
        const float scale = half_at(chunk + 1024 + 2 * column);
        for (int j = 0; j < kGroup; j++) {
            const int code = format == Format::q8_0 ? int(chunk[(j / 4) * 128 + column * 4 + j % 4]) - 128 : int8_t(chunk[32 * column + j]);
            out[j] = float(code) * scale;
        }
        return;
    }
    const float scale = half_at(chunk + 512 + 2 * column);
    const float minimum = has_minimum(format) ? half_at(chunk + 576 + 2 * column) : 0.0f;
    if (format == Format::q4_0_tiles || format == Format::q4_1_tiles) {
        for (int j = 0; j < kGroup; j++) {
            const int code = code_at(chunk, column, j);
            const float value = float(has_minimum(format) ? code : code - 8) * scale;
            out[j] = has_minimum(format) ? value + minimum : value;
        }
        return;
    }
    for (int j = 0; j < 16; j++) {
        const int byte = chunk[64 * (2 * (j / 4) + column / 16) + 4 * (column % 16) + j % 4];
        const int low = byte & 15, high = byte >> 4;
        if (format == Format::q4_0) {
            out[j] = float(low - 8) * scale;
            out[16 + j] = float(high - 8) * scale;
        } else {
            const float a = float(low) * scale, b = float(high) * scale;
            out[j] = a + minimum;
            out[16 + j] = b + minimum;
        }
    }
}

void unpack_row(const Matrix& m, int row, float* out) {
    const int column = row % kPanel;
    const uint8_t* panel = m.data + size_t(row / kPanel) * m.panel_bytes;
    uint16_t h;
    switch (m.format) {
        case Format::f32:
            for (int j = 0; j < m.k; j++) std::memcpy(out + j, panel + (size_t(j) * kPanel + column) * 4, 4);
            return;
        case Format::f16:
            for (int j = 0; j < m.k; j++) out[j] = half_at(panel + (size_t(j) * kPanel + column) * 2);
            return;
        case Format::bf16:
            for (int j = 0; j < m.k; j++) {
                std::memcpy(&h, panel + (size_t(j / 2) * 2 * kPanel + column * 2 + j % 2) * 2, 2);
                out[j] = bf16_to_f32(h);
            }
            return;
        case Format::i8_rotated: {
            float scale;
            std::memcpy(&scale, panel + size_t(m.k) * kPanel + 4 * column, 4);
            for (int j = 0; j < m.k; j++) out[j] = float(int(panel[(size_t(j / 4) * kPanel + size_t(column)) * 4 + size_t(j % 4)]) - 128) * scale;
            return;
        }
        default:
            for (int g = 0; g < m.k / kGroup; g++) unpack_group(m.format, panel + g * chunk_bytes(m.format), column, out + g * kGroup);
    }
}

}  // namespace pagemill
