// The header of a frame in a slot, as experts/frames.py has it: 64 bytes, little-endian, its checksum over the first 56.
#pragma once
#include <cstdint>
#include <cstring>

namespace shoal {

constexpr uint32_t MAGIC = 0x4c4f4853;  // "SHOL"
constexpr uint16_t FRAME_VERSION = 2, FORWARD = 1, REPLY = 2;
constexpr uint32_t COVERS_HEADER = 1;
constexpr long MOST_ROWS = 1 << 16, MOST_PAIRS = 1 << 20, MOST_HIDDEN = 1 << 16, MOST_PAYLOAD = 1 << 30;
constexpr long HEADER_BYTES = 64, CHECKED_BYTES = 56;

#pragma pack(push, 1)
struct Header {
  uint32_t magic;
  uint16_t version, kind;
  uint32_t layer;
  uint64_t epoch, generation, correlation;
  uint32_t rows, pairs, hidden, payload, coverage, checksum, nothing;
};
#pragma pack(pop)
static_assert(sizeof(Header) == HEADER_BYTES);

// CRC-32 as zlib has it. A table of 16 is one cache line, which matters more here than the steps that a larger saves.
inline uint32_t crc32(const void* bytes, long count) {
  static constexpr uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
                                         0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                         0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
  uint32_t crc = ~0u;
  for (long i = 0; i < count; i++) {
    crc ^= static_cast<const uint8_t*>(bytes)[i];
    crc = (crc >> 4) ^ table[crc & 15];
    crc = (crc >> 4) ^ table[crc & 15];
  }
  return ~crc;
}

inline bool over_caps(long rows, long pairs, long hidden, long payload) {
  return rows > MOST_ROWS || pairs > MOST_PAIRS || hidden > MOST_HIDDEN || payload > MOST_PAYLOAD;
}

// Completes a header and puts it at the beginning of a slot.
inline void put_header(char* slot, Header header) {
  header.magic = MAGIC;
  header.version = FRAME_VERSION;
  header.coverage = COVERS_HEADER;
  header.checksum = crc32(&header, CHECKED_BYTES);
  header.nothing = 0;
  std::memcpy(slot, &header, HEADER_BYTES);
}

// A copy of the header in a slot; false unless it is a whole frame of `length` bytes, of this kind and call.
inline bool get_header(const char* slot, long slot_bytes, uint64_t length, uint16_t kind, uint64_t correlation,
                       Header& header) {
  if (length < static_cast<uint64_t>(HEADER_BYTES) || length > static_cast<uint64_t>(slot_bytes)) return false;
  std::memcpy(&header, slot, HEADER_BYTES);
  return header.magic == MAGIC && header.version == FRAME_VERSION && header.kind == kind &&
         header.coverage == COVERS_HEADER && header.correlation == correlation &&
         !over_caps(header.rows, header.pairs, header.hidden, header.payload) &&
         header.payload == length - HEADER_BYTES && header.checksum == crc32(&header, CHECKED_BYTES);
}

}  // namespace shoal
