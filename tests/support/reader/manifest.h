// What a tree must contain: every regular file with its size and a digest a block, so that any aligned piece
// of it can be checked. Text, one line a file: "<size> <block digests, 16 hex digits each, comma separated or
// -> <path>".
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace holdfast::reader {

inline constexpr uint64_t kBlock = 65536;

struct File {
  std::string path;  // relative to the root
  uint64_t size = 0;
  std::vector<uint64_t> blocks;  // first 8 bytes of each block's SHA-256
  uint64_t block_bytes(uint64_t block) const {
    return size - block * kBlock < kBlock ? size - block * kBlock : kBlock;
  }
};

uint64_t BlockDigest(const void* data, uint64_t size);

// Walks `root` (one file system, symlinks not followed). Throws std::runtime_error with path and reason.
std::vector<File> Scan(const std::string& root);
void Write(const std::vector<File>& files, const std::string& path);
std::vector<File> Load(const std::string& path);

}  // namespace holdfast::reader
