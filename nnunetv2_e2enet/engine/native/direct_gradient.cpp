// The backward pass of convolutions that are multiplied out: strided ones of the encoder, and the heads.
#include <algorithm>

#include "blocks.h"
#include "driver.h"
#include "gradient_blocks.h"
#include "window.h"

namespace e2e {
namespace {

// A tap of the kernel along one axis that reaches a position `sub` of the stride's window, and from which coarse pixel.
struct Tap {
    int tap, from;
};

std::vector<Tap> taps_of(int stride, int sub) {
    std::vector<Tap> taps;
    for (int t = 0; t < 3; ++t)
        if ((sub + 1 - t) % stride == 0) taps.push_back({t, (sub + 1 - t) / stride});
    return taps;
}

int64_t count_dots(const Kernels& kernels, int64_t rows, int64_t columns) {
    return divide_up(rows, kernels.dot_rows) * divide_up(columns, kernels.dot_columns) * kernels.lanes;
}

// What a thread has for itself. turned[position in the stride's window][group of inputs][tap][output][kDenseRows], the taps
// in the order of taps_of, rows before columns.
class StridedGradient {
  public:
    StridedGradient(const Kernels& kernels, const StridedGradientJob& job, int threads)
        : kernels_(kernels), job_(job), sh_(job.stride[1]), sw_(job.stride[2]), inputs_(job.in.channels),
          outputs_(job.gradient.channels),
          vectors_(vectors_of_block(kernels, job.gradient.grid, 32, threads)),
          dots_(count_dots(kernels, outputs_, inputs_)), still_(static_cast<size_t>(outputs_), 0),
          window_(kernels, job.in, job.shift, job.stride), around_(*kernels.floats(), job.gradient, still_.data(), kOnce),
          groups_(cut_groups(job.shift, inputs_)), pieces_(groups_.size() * static_cast<size_t>(sh_)) {}

    int tiles() const { return vectors_ * kernels_.lanes; }

    int64_t reserve(float* base) {
        Scratch scratch(base);
        fine_ = scratch.take(window_.floats(tiles()));
        coarse_ = scratch.take(around_.floats(tiles()));
        for (float*& products : products_) products = scratch.take(round_up(inputs_, kDenseRows) * tiles());
        sums_ = scratch.take(kTaps * dots_);
        return scratch.used();
    }

    void clear() { std::fill(sums_, sums_ + kTaps * dots_, 0.0f); }

    void block(int64_t first) {
        const Grid& grid = job_.gradient.grid;
        const int64_t n = std::min<int64_t>(vectors_, divide_up(grid.tiles - first, kernels_.lanes)), tiles = n * kernels_.lanes;
        const std::vector<Segment> rows = cut_rows(grid, first, tiles);
        if (first + tiles > grid.tiles) {  // lanes that no tile is in must not spoil sums
            std::fill(fine_, fine_ + window_.floats(tiles), 0.0f);
            std::fill(coarse_, coarse_ + around_.floats(tiles), 0.0f);
        }
        window_.fill(rows, tiles, 0, inputs_, fine_);
        around_.fill(rows, tiles, 0, outputs_, coarse_);
        sum_up(static_cast<int>(n));
        if (!job_.into) return;
        for (size_t k = 0; k < pieces_.size(); ++k)
            pieces_[k].cut(rows, job_.in.grid, job_.stride, -groups_[k / static_cast<size_t>(sh_)].shift, static_cast<int>(k) % sh_, 0,
                           job_.in.grid.depth, job_.in.grid.chunk, kernels_.lanes, tiles);
        const float* turned = job_.turned;
        for (int a = 0; a < sh_; ++a)
            for (int b = 0; b < sw_; ++b) turned += multiply_position(a, b, turned, static_cast<int>(n));
    }

    void finish(const StridedGradient* all, int thread, int team) const {
        const Share share(kTaps * dots_, thread, team);
        for (int64_t k = share.first; k < share.last; ++k) {
            float total = 0;
            for (int t = 0; t < team; ++t) total += all[t].sums_[k];
            if (job_.places[k] >= 0) job_.weight_gradient[job_.places[k]] += total;
        }
    }

  private:
    static constexpr int32_t kOnce[3] = {1, 1, 1};

    const float* coarse_at(int64_t row, int64_t column, int64_t tiles) const {
        return coarse_ + ((row + 1) * around_.columns + column + 1) * around_.pitch(tiles);
    }

    void sum_up(int n) {
        const Grid& grid = job_.gradient.grid;
        const int64_t tiles = int64_t{n} * kernels_.lanes;
        const float *in[kTaps][kPhases], *out[kPhases];
        int count = 0;
        for (int q = 0; q < kPhases; ++q) {
            if (q / kTile >= grid.height || q % kTile >= grid.width) continue;
            const float* bases[kTaps];
            window_.taps(fine_, tiles, q, bases);
            for (int t = 0; t < kTaps; ++t) in[t][count] = bases[t];
            out[count++] = coarse_at(q / kTile, q % kTile, tiles);
        }
        for (int t = 0; t < kTaps; ++t)
            kernels_.dense_dots(out, static_cast<int>(outputs_), in[t], static_cast<int>(inputs_), count, sums_ + t * dots_, n);
    }

    // The gradient of the input at one position of the stride's window; returns how many weights it took.
    int64_t multiply_position(int a, int b, const float* turned, int n) {
        const std::vector<Tap> rows = taps_of(sh_, a), columns = taps_of(sw_, b);
        const int taps = static_cast<int>(rows.size() * columns.size());
        const int64_t tiles = int64_t{n} * kernels_.lanes;
        for (int y = 0; y < kTile; ++y) {
            for (int x = 0; x < kTile / sw_; ++x) {
                for (int way = 0; way < sw_; ++way) {
                    const float* bases[kTaps];
                    int count = 0;
                    for (const Tap& row : rows)
                        for (const Tap& column : columns)
                            bases[count++] = coarse_at(y + row.from, x + way * kTile / sw_ + column.from, tiles);
                    kernels_.dense_product(bases, taps, static_cast<int>(outputs_), turned, static_cast<int>(inputs_), products_[way], n);
                }
                const int phase = (sh_ * y + a) % kTile * kTile + sw_ * x + b, below = sh_ * y / kTile;
                for (size_t g = 0; g < groups_.size(); ++g) {
                    const Pieces& pieces = pieces_[g * static_cast<size_t>(sh_) + static_cast<size_t>(below)];
                    if (pieces.pieces.empty()) continue;
                    kernels_.add_pieces(products_, sw_, groups_[g].first, groups_[g].last, n, pieces.pieces.data(),
                                        pieces.first.data(), job_.into + phase * kChunk);
                }
            }
        }
        return int64_t{taps} * outputs_ * round_up(inputs_, kDenseRows);
    }

    const Kernels& kernels_;
    const StridedGradientJob& job_;
    const int sh_, sw_;
    const int64_t inputs_, outputs_;
    const int vectors_;
    const int64_t dots_;
    const std::vector<int32_t> still_;
    Window window_, around_;
    const std::vector<Group> groups_;
    std::vector<Pieces> pieces_;
    float *fine_ = nullptr, *coarse_ = nullptr, *products_[2] = {}, *sums_ = nullptr;
};

constexpr int32_t StridedGradient::kOnce[3];

// A thread's part of a head.
class HeadGradient {
  public:
    HeadGradient(const Kernels& kernels, const HeadGradientJob& job, int threads)
        : kernels_(kernels), job_(job), inputs_(job.in.channels),
          vectors_(vectors_of_block(kernels, job.in.grid, kChunk, threads)),
          pixels_pitch_(odd_lines(inputs_ * tiles())), logits_pitch_(odd_lines(job.classes * tiles())),
          dots_(count_dots(kernels, job.classes, inputs_)), biases_(static_cast<size_t>(job.classes), 0.0) {}

    int tiles() const { return vectors_ * kernels_.lanes; }

    int64_t reserve(float* base) {
        Scratch scratch(base);
        pixels_ = scratch.take(kPhases * pixels_pitch_);
        logits_ = scratch.take(kPhases * logits_pitch_);
        products_ = scratch.take(round_up(inputs_, kDenseRows) * tiles());
        sums_ = scratch.take(dots_);
        return scratch.used();
    }

    void clear() { std::fill(sums_, sums_ + dots_, 0.0f); }

    void block(int64_t first) {
        const Grid& grid = job_.in.grid;
        const int64_t all = tiles();
        const std::vector<Segment> rows = cut_rows(grid, first, all);
        std::fill(logits_, logits_ + kPhases * logits_pitch_, 0.0f);
        if (first + all > grid.tiles) std::fill(pixels_, pixels_ + kPhases * pixels_pitch_, 0.0f);
        std::vector<Span> spans;
        for (const Segment& s : rows)
            for (int64_t q = 0; q < kPhases; ++q) load_row(s, q, spans);
        const int64_t there = place(first, grid.chunk);
        for (int64_t c = 0; c < inputs_; ++c) {
            if (c + 1 < inputs_) prefetch_block(kernels_, at(kernels_, job_.in.data, (c + 1) * kChannel + there), all);
            kernels_.gather(channel_of(kernels_, job_.in, c), spans.data(), static_cast<int64_t>(spans.size()), 1,
                            scale_of(job_.in, c), offset_of(job_.in, c), slope_of(job_.in), pixels_ + c * all);
        }
        const float *in[kPhases], *out[kPhases];
        for (int64_t q = 0; q < kPhases; ++q) {
            in[q] = pixels_ + q * pixels_pitch_;
            out[q] = logits_ + q * logits_pitch_;
            kernels_.dense_product(out + q, 1, job_.classes, job_.turned, static_cast<int>(inputs_), products_, vectors_);
            store_products(first, q);
        }
        kernels_.dense_dots(out, job_.classes, in, static_cast<int>(inputs_), kPhases, sums_, vectors_);
    }

    void finish(const HeadGradient* all, int thread, int team) const {
        const Share share(dots_, thread, team), classes(job_.classes, thread, team);
        for (int64_t k = share.first; k < share.last; ++k) {
            float total = 0;
            for (int t = 0; t < team; ++t) total += all[t].sums_[k];
            if (job_.places[k] >= 0) job_.weight_gradient[job_.places[k]] += total;
        }
        for (int64_t k = classes.first; job_.bias_gradient && k < classes.last; ++k) {
            double total = 0;
            for (int t = 0; t < team; ++t) total += all[t].biases_[static_cast<size_t>(k)];
            job_.bias_gradient[k] += static_cast<float>(total);
        }
    }

  private:
    // One phase of a row of tiles: the gradient of its logits, and where its pixels lie.
    void load_row(const Segment& s, int64_t q, std::vector<Span>& spans) {
        const Grid& grid = job_.in.grid;
        const int64_t y = kTile * s.row + q / kTile, x = kTile * s.column + q % kTile, all = tiles();
        int64_t n = y < grid.height && x < grid.width ? std::min(s.count, (grid.width - 1 - x) / kTile + 1) : 0;
        const int64_t tile = s.slice * grid.slice + s.row * grid.tiles_x + s.column, to = q * pixels_pitch_ + s.lane;
        if (n > 0) spans.push_back({place(tile, grid.chunk) + q * kChunk, to, static_cast<int32_t>(n)});
        if (n < s.count) spans.push_back({-1, to + n, static_cast<int32_t>(s.count - n)});
        for (int64_t k = 0; k < job_.classes; ++k) {
            const float* from = job_.logits + ((k * grid.depth + s.slice) * grid.height + y) * grid.width + x;
            float* target = logits_ + q * logits_pitch_ + k * all + s.lane;
            double total = 0;
            for (int64_t t = 0; t < n; ++t) {
                target[t] = from[t * kTile];
                total += static_cast<double>(target[t]);
            }
            biases_[static_cast<size_t>(k)] += total;
        }
    }

    void store_products(int64_t first, int64_t q) const {
        const int64_t all = tiles();
        for (int64_t c = 0; c < inputs_; ++c) {
            float* to = job_.into + c * kChannel + q * kChunk;
            kernels_.accumulate(products_ + c * all, all, to + place(first, job_.in.grid.chunk), job_.add);
        }
    }

    const Kernels& kernels_;
    const HeadGradientJob& job_;
    const int64_t inputs_;
    const int vectors_;
    const int64_t pixels_pitch_, logits_pitch_, dots_;
    std::vector<double> biases_;
    float *pixels_ = nullptr, *logits_ = nullptr, *products_ = nullptr, *sums_ = nullptr;
};

}  // namespace

int64_t run_strided_gradient(const Kernels& kernels, const StridedGradientJob& job, float* scratch, int threads) {
    return run_blocks<StridedGradient>(kernels, job, job.gradient.grid, kStridedGradient, scratch, threads);
}

int64_t run_head_gradient(const Kernels& kernels, const HeadGradientJob& job, float* scratch, int threads) {
    return run_blocks<HeadGradient>(kernels, job, job.in.grid, kHeadGradient, scratch, threads);
}

}  // namespace e2e
