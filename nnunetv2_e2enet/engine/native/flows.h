// What a fusion conv reads: flows that stay where they are, and the upward flow, computed a few slices at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "driver.h"

namespace e2e {

constexpr int64_t kUpsampledBytes = 12 << 20;  // of an upward flow to hold at a time, at least one round of slices

class Flows {
  public:
    Flows(const Kernels& kernels, const ConvJob& conv)
        : kernels_(kernels), maps_(conv.flows), n_(conv.n_flows), upward_(conv.upward), shift_(conv.shift), job_(conv.upsample),
          grid_(conv.out.grid), slices_(grid_.depth) {
        if (upward_ < 0) return;
        for (int flow = 0; flow < upward_; ++flow) first_up_ += maps_[flow].channels;
        const int64_t whole = kCacheLine / gcd(grid_.slice, kCacheLine);  // slices until rounds start on a vector
        const int64_t fit = kUpsampledBytes / (job_.outputs * kPhases * grid_.slice * kernels_.pixel_bytes);
        slices_ = std::min<int64_t>(grid_.depth, std::max<int64_t>(whole, fit / whole * whole));
    }

    int64_t slices() const { return slices_; }  // of the output in one round

    void reserve(Scratch& scratch, int threads) {
        if (upward_ < 0) return;
        const int64_t chunks = divide_up(slices_ * grid_.slice, kChunk) + 2 * guard_chunks(grid_);
        up_ = scratch.take(divide_up(chunks * kChannel * job_.outputs * kernels_.pixel_bytes, sizeof(float)));
        per_thread_ = upsample_scratch(kernels_, job_);
        up_scratch_ = scratch.take(per_thread_ * threads);
    }

    // All channels of the concatenation; those of the upward flow are complete after `upsample`.
    std::vector<Channel> channels() const {
        std::vector<Channel> channels;
        for (int flow = 0; flow < n_; ++flow) {
            const Map& map = maps_[flow];
            for (int64_t c = 0; c < map.channels; ++c) {
                const int64_t moved = shift_[channels.size()], depth = map.grid.depth, slice = map.grid.slice;
                Channel channel{};
                channel.lo = std::max<int64_t>(0, moved) * slice;
                channel.hi = std::min<int64_t>(depth, depth + moved) * slice;
                channel.slope = 1.0f;
                channel.scale = 1.0f;
                if (flow != upward_) {
                    channel.data = channel_of(kernels_, map, c);
                    channel.chunk = map.grid.chunk;
                    channel.move = -moved * slice;
                    channel.scale = scale_of(map, c);
                    channel.offset = offset_of(map, c);
                    channel.slope = slope_of(map);
                }
                channels.push_back(channel);
            }
        }
        return channels;
    }

    // The upward flow of some slices of the output. All threads of a team take part, and meet before they read it.
    void upsample(Channel* channels, int64_t first, int64_t last, int thread, int team) const {
        const int64_t chunk = int64_t{kChannel} * job_.outputs;
        const UpsampleTarget target{at(kernels_, up_, guard_chunks(grid_) * chunk), chunk, first, last};
        for (int32_t c = 0; c < job_.outputs; ++c) {
            Channel& channel = channels[first_up_ + c];
            channel.data = at(kernels_, target.data, c * kChannel);
            channel.chunk = chunk;
            channel.move = -first * grid_.slice;
        }
        upsample_slices(kernels_, job_, grid_, shift_ + first_up_, target, up_scratch_ + thread * per_thread_, thread, team);
    }

  private:
    static int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

    const Kernels& kernels_;
    const Map* maps_;
    const int32_t n_, upward_;
    const int32_t* shift_;
    const Upsample& job_;
    const Grid& grid_;
    int64_t slices_, first_up_ = 0, per_thread_ = 0;
    float *up_ = nullptr, *up_scratch_ = nullptr;
};

}  // namespace e2e
