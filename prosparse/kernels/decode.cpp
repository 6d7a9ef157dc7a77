// The operators of decode.py on a CPU: few tokens, weights read once, one contiguous row a neuron, sums in fp32.
//
// In: tensors of one dtype (fp32, bf16, fp16), at most as many rows as registers hold (decode.py sees to that).
// Out: tensors of that dtype. The sums do not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <vector>

namespace {

using Floats = at::vec::Vectorized<float>;
constexpr int64_t STEP = 2 * Floats::size();  // one full register of a 16-bit type
constexpr int64_t CACHE_LINE = 64;
constexpr int R = 2;  // rows that share one pass over the hidden states

template <typename T>
std::pair<Floats, Floats> load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Floats::loadu(from), Floats::loadu(from + Floats::size())};
  } else {
    auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
    return {low, high};
  }
}

template <typename T>
void prefetch(const T* row) {
  for (int64_t byte = 0; byte < STEP * int64_t(sizeof(T)); byte += CACHE_LINE)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

// out[r * B + b] = rows[r] · x[b]; `next` are the rows to come.
template <typename T, int B>
void dots(const T* const* rows, const T* const* next, const float* x, int64_t hidden, float* out) {
  Floats sums[R][B];
  for (auto& row : sums)
    for (auto& sum : row) sum = Floats(0);
  int64_t i = 0;
  for (; i + STEP <= hidden; i += STEP) {
    Floats low[R], high[R];
    for (int r = 0; r < R; ++r) {
      prefetch(next[r] + i);
      std::tie(low[r], high[r]) = load_pair(rows[r] + i);
    }
    for (int b = 0; b < B; ++b) {
      const auto first = Floats::loadu(x + b * hidden + i), second = Floats::loadu(x + b * hidden + i + Floats::size());
      for (int r = 0; r < R; ++r) {
        sums[r][b] = at::vec::fmadd(low[r], first, sums[r][b]);
        sums[r][b] = at::vec::fmadd(high[r], second, sums[r][b]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      float lanes[Floats::size()];
      sums[r][b].store(lanes);
      float total = std::accumulate(lanes, lanes + Floats::size(), 0.f);
      for (int64_t j = i; j < hidden; ++j) total += float(rows[r][j]) * x[b * hidden + j];
      out[r * B + b] = total;
    }
  }
}

template <typename T>
using Dots = void (*)(const T* const*, const T* const*, const float*, int64_t, float*);

template <typename T>
Dots<T> dots_for(int64_t batch) {
  constexpr Dots<T> all[] = {dots<T, 1>, dots<T, 2>, dots<T, 3>, dots<T, 4>,
                             dots<T, 5>, dots<T, 6>, dots<T, 7>, dots<T, 8>};
  return all[batch - 1];
}

// done(n, sums) for every n-th of `list`, sums[b] being that row of weight [., width] times x[b]; R rows at a time.
template <typename T, typename F>
void multiply(const std::vector<int64_t>& list, const T* weight, const std::vector<float>& x, int64_t width, F done) {
  const int64_t batch = x.size() / width, count = list.size();
  const auto dot = dots_for<T>(batch);
  at::parallel_for(0, (count + R - 1) / R, 8, [&](int64_t from, int64_t until) {
    const auto row = [&](int64_t a) { return weight + list[std::min(a, count - 1)] * width; };
    float sums[R * 8];
    for (int64_t a = from * R; a < std::min(until * R, count); a += R) {
      const T *now[R], *next[R];
      for (int r = 0; r < R; ++r) now[r] = row(a + r), next[r] = row(a + R + r);
      dot(now, next, x.data(), width, sums);
      for (int r = 0; r < R && a + r < count; ++r) done(list[a + r], sums + r * batch);
    }
  });
}

// sums[b] += Σ_r factors[r][b] · rows[r], each over `columns`; `next` are the rows to come.
template <typename T, int N>
void add_rows(const T* const* rows, const T* const* next, const float* factors, int64_t batch, int64_t columns,
              float* sums) {
  int64_t i = 0;
  for (; i + STEP <= columns; i += STEP) {
    Floats low[N], high[N];
    for (int r = 0; r < N; ++r) {
      prefetch(next[r] + i);
      std::tie(low[r], high[r]) = load_pair(rows[r] + i);
    }
    for (int64_t b = 0; b < batch; ++b) {
      float* at = sums + b * columns + i;
      Floats first = Floats::loadu(at), second = Floats::loadu(at + Floats::size());
      for (int r = 0; r < N; ++r) {
        first = at::vec::fmadd(low[r], Floats(factors[r * batch + b]), first);
        second = at::vec::fmadd(high[r], Floats(factors[r * batch + b]), second);
      }
      first.store(at);
      second.store(at + Floats::size());
    }
  }
  for (; i < columns; ++i)
    for (int64_t b = 0; b < batch; ++b)
      for (int r = 0; r < N; ++r) sums[b * columns + i] += factors[r * batch + b] * float(rows[r][i]);
}

template <typename T>
std::vector<float> floats(const at::Tensor& tensor) {
  const T* from = tensor.const_data_ptr<T>();
  return std::vector<float>(from, from + tensor.numel());
}

template <typename T>
const T* data_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

template <typename F>
void by_type(const at::Tensor& tensor, F run) {
  AT_DISPATCH_SWITCH(tensor.scalar_type(), "prosparse_decode",
                     AT_DISPATCH_CASE(at::kFloat, [&] { run(scalar_t()); })
                     AT_DISPATCH_CASE(at::kBFloat16, [&] { run(scalar_t()); })
                     AT_DISPATCH_CASE(at::kHalf, [&] { run(scalar_t()); }));
}

// The columns of [batch, neurons] where `active` holds in any row, in order.
template <typename F>
std::vector<int64_t> any_active(int64_t batch, int64_t neurons, F active) {
  std::vector<int64_t> list(neurons);
  int64_t found = 0;
  for (int64_t n = 0; n < neurons; ++n) {
    bool any = false;
    for (int64_t b = 0; b < batch; ++b) any |= active(b * neurons + n);
    list[found] = n;
    found += any;
  }
  list.resize(found);
  return list;
}

// hidden [batch, hidden] times weight [neurons, hidden] transposed, plus bias [neurons].
at::Tensor dense(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t batch = hidden.size(0), width = hidden.size(1), neurons = weight.size(0);
  auto out = at::empty({batch, neurons}, hidden.options());
  by_type(hidden, [&](auto zero) {
    using scalar_t = decltype(zero);
      const auto x = floats<scalar_t>(hidden);
      const auto* w = weight.const_data_ptr<scalar_t>();
      const auto* add = data_of<scalar_t>(bias);
      auto* to = out.mutable_data_ptr<scalar_t>();
      std::vector<int64_t> all(neurons);
      std::iota(all.begin(), all.end(), 0);
      multiply(all, w, x, width, [&](int64_t n, const float* sums) {
        for (int64_t b = 0; b < batch; ++b) to[b * neurons + n] = sums[b] + (add ? float(add[n]) : 0.f);
      });
  });
  return out;
}

// x1 [batch, neurons]: see decode.py. cut: the gate passes where it is >= threshold, else where it is not <= 0.
at::Tensor sparse_up(const at::Tensor& gate, const at::Tensor& hidden, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, double threshold, bool cut, bool relu_up) {
  const int64_t batch = hidden.size(0), width = hidden.size(1), neurons = weight.size(0);
  auto out = at::zeros({batch, neurons}, hidden.options());
  by_type(hidden, [&](auto zero) {
    using scalar_t = decltype(zero);
      const auto x = floats<scalar_t>(hidden);
      const auto* scores = gate.const_data_ptr<scalar_t>();
      const auto* w = weight.const_data_ptr<scalar_t>();
      const auto* add = data_of<scalar_t>(bias);
      auto* to = out.mutable_data_ptr<scalar_t>();
      const float least = float(threshold);
      const auto passes = [&](int64_t i) {
        return cut ? float(scores[i]) >= least : !(float(scores[i]) <= 0.f);  // ReLU lets NaN through
      };
      const auto active = any_active(batch, neurons, passes);
      multiply(active, w, x, width, [&](int64_t n, const float* sums) {
        for (int64_t b = 0; b < batch; ++b) {
          const int64_t i = b * neurons + n;
          const float up = sums[b] + (add ? float(add[n]) : 0.f);
          if (passes(i)) to[i] = float(scores[i]) * (relu_up && up <= 0.f ? 0.f : up);
        }
      });
  });
  return out;
}

// x1 [batch, neurons] times rows [neurons, hidden], plus bias [hidden].
at::Tensor sparse_down(const at::Tensor& x1, const at::Tensor& rows, const std::optional<at::Tensor>& bias) {
  constexpr int N = 4;  // rows that share one pass over the sums
  const int64_t batch = x1.size(0), neurons = rows.size(0), width = rows.size(1);
  auto out = at::empty({batch, width}, x1.options());
  by_type(x1, [&](auto zero) {
    using scalar_t = decltype(zero);
      const auto* x = x1.const_data_ptr<scalar_t>();
      const auto* w = rows.const_data_ptr<scalar_t>();
      const auto* add = data_of<scalar_t>(bias);
      auto* to = out.mutable_data_ptr<scalar_t>();
      const auto active = any_active(batch, neurons, [&](int64_t i) { return float(x[i]) != 0.f; });
      const int64_t count = active.size();
      std::vector<float> factors(count * batch);
      for (int64_t a = 0; a < count; ++a)
        for (int64_t b = 0; b < batch; ++b) factors[a * batch + b] = x[b * neurons + active[a]];
      constexpr int64_t BLOCK = 128;  // columns
      at::parallel_for(0, (width + BLOCK - 1) / BLOCK, 1, [&](int64_t from, int64_t until) {
        const int64_t start = from * BLOCK, columns = std::min(until * BLOCK, width) - start;
        std::vector<float> sums(batch * columns, 0.f);
        const auto row = [&](int64_t a) { return w + active[std::min(a, count - 1)] * width + start; };
        int64_t a = 0;
        for (; a + N <= count; a += N) {
          const scalar_t *now[N], *next[N];
          for (int r = 0; r < N; ++r) now[r] = row(a + r), next[r] = row(a + N + r);
          add_rows<scalar_t, N>(now, next, &factors[a * batch], batch, columns, sums.data());
        }
        for (; a < count; ++a) {
          const scalar_t *now = row(a), *next = row(a + 1);
          add_rows<scalar_t, 1>(&now, &next, &factors[a * batch], batch, columns, sums.data());
        }
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t i = 0; i < columns; ++i)
            to[b * width + start + i] = sums[b * columns + i] + (add ? float(add[start + i]) : 0.f);
      });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(prosparse_decode, m) {
  m.def("dense(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor");
  m.def("sparse_up(Tensor gate, Tensor hidden, Tensor weight, Tensor? bias, float threshold, bool cut, bool relu_up)"
        " -> Tensor");
  m.def("sparse_down(Tensor x1, Tensor rows, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(prosparse_decode, CPU, m) {
  m.impl("dense", dense);
  m.impl("sparse_up", sparse_up);
  m.impl("sparse_down", sparse_down);
}
