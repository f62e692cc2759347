// A layer's rows to the hosts of this machine and back: each end in one call, so that what it touches is little. Weights
// leave nothing of an interpreter in the caches between two layers.
#include "lane.h"

#include <vector>

#include "calls.h"
#include "frame.h"
#include "pool.h"

using namespace shoal;

namespace {

constexpr long COPY_ALONE = 1 << 17;  // numbers that the caller copies itself

void copy_rows(const float* x, const long* rows, long count, long width, float* to) {
  auto copy = [&](long r) { std::memcpy(to + r * width, x + rows[r] * width, width * sizeof(float)); };
  if (count * width <= COPY_ALONE) {
    for (long r = 0; r < count; r++) copy(r);
  } else {
    pool().run(count, copy);
  }
}

// What a dispatch has of each host, as experts/flight.py reads it.
struct Leg {
  long slot;         // in which the request goes, and the reply comes
  long correlation;
  long generation;   // of the host
  long first, pairs;  // its part of the slots that were kept
  long rows;         // that were sent
};

struct Asked {
  long lane, slot, length, correlation;
  long whole;  // whether the rest could be read: a forward request as long as its tensors
  long layer, generation, rows, pairs, hidden;
};

}  // namespace

extern "C" {

// Splits all slots of a dispatch by owner[expert], as shoal_split_slots does, and writes each owner's part into its
// lane: rows of x once each, then the slots' rows, then their experts. `kept` gets the slots of each owner in turn.
// `counted`, if given, grows by the rows of each expert. When all is written, all are told, and woken.
// Returns 0; 1 + an expert that has no owner; or -1 when something does not fit, and nobody was told anything.
long shoal_send(const Lane* const* lanes, Leg* legs, long hosts, const long* expert_of_slot, long tokens, long top,
                const int* owner, const float* x, long width, long layer, long epoch, long* counted, long experts,
                long* kept) {
  static thread_local std::vector<long> rows, firsts;
  static thread_local std::vector<int> numbers;
  long count = tokens * top;
  rows.resize(count);
  numbers.resize(2 * count);
  firsts.resize(2 * (hosts + 1));
  long *first_row = firsts.data(), *first_slot = first_row + hosts + 1;
  int *slot_row = numbers.data(), *slot_expert = slot_row + count;
  long missing = shoal_split_slots(expert_of_slot, nullptr, count, top, owner, hosts, rows.data(), kept, slot_row,
                                   slot_expert, first_row, first_slot);
  if (missing) return missing;
  for (long h = 0; h < hosts; h++) {
    Leg& leg = legs[h];
    leg.first = first_slot[h];
    leg.pairs = first_slot[h + 1] - first_slot[h];
    leg.rows = first_row[h + 1] - first_row[h];
    long sent = leg.rows * width * 4 + leg.pairs * 8, back = leg.pairs * width * 4;
    if (sent > lanes[h]->out_slot_bytes - HEADER_BYTES || back > lanes[h]->in_slot_bytes - HEADER_BYTES ||
        over_caps(leg.rows, leg.pairs, width, std::max(sent, back)))
      return -1;
  }
  for (long h = 0; h < hosts; h++) {
    const Leg& leg = legs[h];
    if (!leg.pairs) continue;
    char* slot = lanes[h]->out_slot(leg.slot);
    float* floats = reinterpret_cast<float*>(slot + HEADER_BYTES);
    int* ints = reinterpret_cast<int*>(floats + leg.rows * width);
    copy_rows(x, rows.data() + first_row[h], leg.rows, width, floats);
    std::memcpy(ints, slot_row + leg.first, leg.pairs * sizeof(int));
    std::memcpy(ints + leg.pairs, slot_expert + leg.first, leg.pairs * sizeof(int));
    Header header{};
    header.kind = FORWARD;
    header.layer = static_cast<uint32_t>(layer);
    header.epoch = static_cast<uint64_t>(epoch);
    header.generation = static_cast<uint64_t>(leg.generation);
    header.correlation = static_cast<uint64_t>(leg.correlation);
    header.rows = static_cast<uint32_t>(leg.rows);
    header.pairs = static_cast<uint32_t>(leg.pairs);
    header.hidden = static_cast<uint32_t>(width);
    header.payload = static_cast<uint32_t>(leg.rows * width * 4 + leg.pairs * 8);
    put_header(slot, header);
  }
  if (counted)
    for (long s = 0; s < count; s++)
      if (expert_of_slot[s] < experts) counted[expert_of_slot[s]]++;
  for (long h = 0; h < hosts; h++)
    if (legs[h].pairs)
      lanes[h]->announce(legs[h].slot, HEADER_BYTES + legs[h].rows * width * 4 + legs[h].pairs * 8,
                         static_cast<uint64_t>(legs[h].correlation));
  // whoever sleeps on this core may take it at once, so it is woken last; it may go elsewhere meanwhile, and is asked once
  uint32_t here = this_core();
  long* own = first_row;
  for (long h = 0; h < hosts; h++) own[h] = lanes[h]->bell && lanes[h]->bell->core.load() == here;
  for (long last = 0; last < 2; last++)
    for (long h = 0; h < hosts; h++)
      if (legs[h].pairs && lanes[h]->bell && own[h] == last) ring(lanes[h]->bell);
  return 0;
}

// Waits for the replies to a dispatch, and sums them where they lie, as shoal_combine does. Returns 0; 1 when some reply
// was not there in time, or will not come; or 2 when some reply must be looked at more closely.
long shoal_receive(const Lane* const* lanes, const Leg* legs, long hosts, const long* kept, const float* weights,
                   long tokens, long top, long width, const float* residual, const float* other, float* out,
                   Bell* bell, long look_ns, long timeout_ns, long* slept) {
  static thread_local std::vector<const long*> slots;
  static thread_local std::vector<const float*> answers;
  static thread_local std::vector<long> counts;
  bool lost = false, has_slept = false;
  bool there = wait_at(bell, look_ns, timeout_ns, has_slept, [&] {
    for (long h = 0; h < hosts; h++) {
      if (!legs[h].pairs) continue;
      uint64_t came = lanes[h]->in_line(legs[h].slot).correlation.load(std::memory_order_acquire);
      if (came == static_cast<uint64_t>(legs[h].correlation)) continue;
      lost = lanes[h]->over.load();
      return lost;
    }
    return true;
  });
  *slept = has_slept;
  if (!there || lost) return 1;
  slots.clear();
  answers.clear();
  counts.clear();
  for (long h = 0; h < hosts; h++) {
    const Leg& leg = legs[h];
    if (!leg.pairs) continue;
    Header header;
    const char* slot = lanes[h]->in_slot(leg.slot);
    uint64_t length = lanes[h]->in_line(leg.slot).length.load(std::memory_order_relaxed);
    if (!get_header(slot, lanes[h]->in_slot_bytes, length, REPLY, static_cast<uint64_t>(leg.correlation), header) ||
        header.generation != static_cast<uint64_t>(leg.generation) || header.pairs != leg.pairs ||
        header.hidden != width || header.payload != leg.pairs * width * 4)
      return 2;
    slots.push_back(kept + leg.first);
    answers.push_back(reinterpret_cast<const float*>(slot + HEADER_BYTES));
    counts.push_back(leg.pairs);
  }
  shoal_combine(slots.data(), answers.data(), counts.data(), static_cast<long>(counts.size()), weights, tokens, top,
                width, residual, other, out);
  return 0;
}

// What was announced in some lanes since it was told last, at most `most` of it; how many there are.
long shoal_news(Lane* const* lanes, long count, Asked* news, long most) {
  long found = 0;
  for (long l = 0; l < count; l++) {
    Lane& lane = *lanes[l];
    for (long s = 0; s < lane.slots && found < most; s++) {
      uint64_t correlation = lane.in_line(s).correlation.load(std::memory_order_acquire);
      if (correlation == lane.seen[s]) continue;
      lane.seen[s] = correlation;
      uint64_t length = lane.in_line(s).length.load(std::memory_order_relaxed);
      Asked& asked = news[found++];
      asked = {l, s, static_cast<long>(length), static_cast<long>(correlation), 0, 0, 0, 0, 0, 0};
      Header header;
      if (get_header(lane.in_slot(s), lane.in_slot_bytes, length, FORWARD, correlation, header) &&
          header.payload == 4 * (static_cast<long>(header.rows) * header.hidden + 2 * static_cast<long>(header.pairs))) {
        asked.whole = 1;
        asked.layer = header.layer;
        asked.generation = static_cast<long>(header.generation);
        asked.rows = header.rows;
        asked.pairs = header.pairs;
        asked.hidden = header.hidden;
      }
    }
  }
  return found;
}

// Waits until something is announced in some lanes that was not told, or the bell has rung since there were so many
// `rings`: looking for `look_ns`, then asleep, for `timeout_ns` in all. Whether it slept.
long shoal_wait_news(const Lane* const* lanes, long count, Bell* bell, unsigned rings, long look_ns, long timeout_ns) {
  bool slept = false;
  wait_at(bell, look_ns, timeout_ns, slept, [&] {
    if (bell->rings.load() != rings) return true;
    for (long l = 0; l < count; l++)
      for (long s = 0; s < lanes[l]->slots; s++)
        if (lanes[l]->in_line(s).correlation.load(std::memory_order_acquire) != lanes[l]->seen[s]) return true;
    return false;
  });
  return slept;
}

// Wakes everybody who sleeps at a bell, and keeps those awake who are about to.
void shoal_ring(Bell* bell) { ring(bell, true); }

// Says what stands in a slot of the peer's; `ring_too` wakes it.
void shoal_announce(const Lane* lane, long slot, long length, long correlation, int ring_too) {
  lane->announce(slot, static_cast<uint64_t>(length), static_cast<uint64_t>(correlation));
  if (ring_too && lane->bell) ring(lane->bell);
}

// Answers a whole request where it lies, straight into the client's memory: SwiGLU of experts as in shoal_experts, of
// those that are `held`. Returns 0, or 1 when it must be looked at more closely, and nothing was said.
long shoal_answer(const Lane* lane, const Asked* asked, const void* const* gate_up, const void* const* down,
                  const long* narrow, const bool* held, long experts, long inner) {
  static thread_local std::vector<int> own;  // read once: the peer may go on writing to the slot
  long rows = asked->rows, pairs = asked->pairs, width = asked->hidden;
  const float* x = reinterpret_cast<const float*>(lane->in_slot(asked->slot) + HEADER_BYTES);
  char* reply = lane->out_slot(asked->slot);
  if (pairs == 0 || pairs * width * 4 > lane->out_slot_bytes - HEADER_BYTES) return 1;
  own.resize(2 * pairs);
  std::memcpy(own.data(), x + rows * width, 2 * pairs * sizeof(int));
  for (long p = 0; p < pairs; p++) {
    int expert = own[pairs + p];
    if (expert < 0 || expert >= experts || !held[expert]) return 1;
  }
  if (shoal_experts(x, width, rows, pairs, own.data(), own.data() + pairs, gate_up, down, narrow, experts, width,
                    inner, reinterpret_cast<float*>(reply + HEADER_BYTES), width, nullptr))
    return 1;
  Header header{};
  header.kind = REPLY;
  header.generation = static_cast<uint64_t>(asked->generation);
  header.correlation = static_cast<uint64_t>(asked->correlation);
  header.pairs = static_cast<uint32_t>(pairs);
  header.hidden = static_cast<uint32_t>(width);
  header.payload = static_cast<uint32_t>(pairs * width * 4);
  put_header(reply, header);
  shoal_announce(lane, asked->slot, HEADER_BYTES + pairs * width * 4, asked->correlation, 1);
  return 0;
}

}  // extern "C"
