#include "common/sha256.h"

#include <iostream>
#include <random>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

std::string Hash(const std::string& text, Sha256::Code code = Sha256::Code::kFastest) {
  Sha256 hash(code);
  hash.Update(text.data(), text.size());
  return hash.FinishHex();
}

// Vectors of FIPS 180-4's examples.
TEST(Sha256Test, MatchesThePublishedVectors) {
  EXPECT_EQ(Hash(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Hash(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256Test, ThePortableCodeAndTheProcessorsGiveTheSameDigests) {
  if (!Sha256::HasSha()) std::cout << "this processor has no SHA instructions: the same code twice\n";
  std::mt19937_64 random(7);
  for (size_t length = 0; length < 600; ++length) {
    std::string text(length, '\0');
    for (char& byte : text) byte = static_cast<char>(random());
    ASSERT_EQ(Hash(text), Hash(text, Sha256::Code::kPortable)) << length;
  }
}

TEST(Sha256Test, PiecesAndTheWholeGiveTheSameDigest) {
  std::string text(1000, 'x');
  Sha256 hash;
  for (size_t i = 0; i < text.size(); i += 7)
    hash.Update(text.data() + i, std::min<size_t>(7, text.size() - i));
  EXPECT_EQ(hash.FinishHex(), Hash(text));
}

TEST(Sha256Test, TheRestOfABlockWholeBlocksAndABeginningComeInOneUpdateAtAnyAddress) {
  std::mt19937_64 random(7);
  std::string text(1 + 130 + 300, '\0');
  for (char& byte : text) byte = static_cast<char>(random());
  for (size_t head = 0; head <= 130; ++head) {
    for (size_t body = 0; body <= 300; body += 1 + head % 7) {
      const char* begin = text.data() + 1;
      Sha256 hash;
      hash.Update(begin, head);
      hash.Update(begin + head, body);
      ASSERT_EQ(hash.FinishHex(), Hash(std::string(begin, head + body), Sha256::Code::kPortable))
          << head << " " << body;
    }
  }
}

}  // namespace
}  // namespace holdfast
