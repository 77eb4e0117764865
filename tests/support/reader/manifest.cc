#include "tests/support/reader/manifest.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace holdfast::reader {
namespace {

std::vector<uint64_t> DigestFile(const std::string& path, uint64_t* size) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw std::runtime_error(path + ": " + std::strerror(errno));
  std::vector<uint64_t> blocks;
  std::vector<char> buffer(kBlock);
  *size = 0;
  while (true) {
    size_t filled = 0;
    while (filled < kBlock) {
      ssize_t n = read(fd, buffer.data() + filled, kBlock - filled);
      if (n < 0) {
        int error = errno;
        close(fd);
        throw std::runtime_error(path + ": " + std::strerror(error));
      }
      if (n == 0) break;
      filled += static_cast<size_t>(n);
    }
    if (filled == 0) break;
    *size += filled;
    blocks.push_back(BlockDigest(buffer.data(), filled));
    if (filled < kBlock) break;
  }
  close(fd);
  return blocks;
}

}  // namespace

uint64_t BlockDigest(const void* data, uint64_t size) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int length = 0;
  if (EVP_Digest(data, size, digest.data(), &length, EVP_sha256(), nullptr) != 1)
    throw std::runtime_error("SHA-256");
  uint64_t value = 0;
  std::memcpy(&value, digest.data(), sizeof value);
  return value;
}

std::vector<File> Scan(const std::string& root) {
  namespace fs = std::filesystem;
  std::vector<File> files;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    if (!entry.is_regular_file() || entry.is_symlink()) continue;
    std::string path = fs::path(entry.path()).lexically_relative(root).string();
    if (path.find('\n') != std::string::npos) continue;  // the format is one line a file
    File file;
    file.path = path;
    file.blocks = DigestFile(entry.path().string(), &file.size);
    files.push_back(std::move(file));
  }
  return files;
}

void Write(const std::vector<File>& files, const std::string& path) {
  std::ofstream out(path);
  char hex[17];
  for (const File& file : files) {
    out << file.size << ' ';
    if (file.blocks.empty()) out << '-';
    for (size_t i = 0; i < file.blocks.size(); i++) {
      std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(file.blocks[i]));
      out << (i == 0 ? "" : ",") << hex;
    }
    out << ' ' << file.path << '\n';
  }
  out.close();
  if (!out) throw std::runtime_error(path + ": cannot be written");
}

std::vector<File> Load(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error(path + ": cannot be read");
  std::vector<File> files;
  std::string line;
  while (std::getline(in, line)) {
    std::istringstream fields(line);
    File file;
    std::string digests;
    fields >> file.size >> digests;
    fields.get();
    std::getline(fields, file.path);
    if (file.path.empty()) throw std::runtime_error(path + ": bad line: " + line.substr(0, 80));
    if (digests != "-") {
      std::istringstream list(digests);
      std::string hex;
      while (std::getline(list, hex, ',')) file.blocks.push_back(std::stoull(hex, nullptr, 16));
    }
    if (file.blocks.size() != (file.size + kBlock - 1) / kBlock) {
      throw std::runtime_error(path + ": block count does not fit the size of " + file.path);
    }
    files.push_back(std::move(file));
  }
  return files;
}

}  // namespace holdfast::reader
