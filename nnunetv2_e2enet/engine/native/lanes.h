// Vectors of tiles: which of their lanes lie in the plane, and which tiles have neighbours.
#pragma once

#include "core.h"
#include "vec.h"

namespace E2E_NAMESPACE {

constexpr int kBlockVectors = E2E_ISA == 256 ? 8 : 4;  // of tiles in a block, at most

// Bit l of each word: of lane l's tile, which pixels lie in the plane, and which neighbours it has there.
struct LaneBits {
    uint32_t row[e2e::kTile], column[e2e::kTile], left, right, above, below;

    LaneBits(const e2e::Grid& grid, int64_t first) : row(), column(), left(0), right(0), above(0), below(0) {
        const int64_t in_slice = (first % grid.slice + grid.slice) % grid.slice;
        int64_t ty = in_slice / grid.tiles_x, tx = in_slice % grid.tiles_x;
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint32_t bit = 1u << lane;
            for (int i = 0; i < e2e::kTile; ++i) {
                if (e2e::kTile * ty + i < grid.height) row[i] |= bit;
                if (e2e::kTile * tx + i < grid.width) column[i] |= bit;
            }
            if (tx > 0) left |= bit;
            if (ty > 0) above |= bit;
            if (tx + 1 < grid.tiles_x) right |= bit;
            if (ty + 1 < grid.tiles_y) below |= bit;
            if (++tx == grid.tiles_x) {
                tx = 0;
                if (++ty == grid.tiles_y) ty = 0;
            }
        }
    }
};

constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

static inline uint32_t bits_between(int64_t first, int64_t lo, int64_t hi) {
    const int64_t from = lo - first, to = hi - first;
    if (from >= kLanes || to <= 0 || from >= to) return 0;
    const uint32_t below_to = to >= kLanes ? kAllLanes : (1u << to) - 1;
    return from <= 0 ? below_to : below_to & ~((1u << from) - 1);
}

}  // namespace E2E_NAMESPACE
