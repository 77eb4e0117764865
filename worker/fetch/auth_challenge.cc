#include "worker/fetch/auth_challenge.h"

#include <cctype>
#include <cstring>

namespace holdfast::fetch {
namespace {

constexpr size_t kMaxHeaderBytes = 16384;
constexpr size_t kMaxChallenges = 8;
constexpr size_t kMaxParams = 16;

class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}

  bool AtEnd() const { return at_ >= text_.size(); }
  size_t position() const { return at_; }
  void Rewind(size_t position) { at_ = position; }

  // True when at least one was there.
  bool SkipSpaces() {
    const size_t before = at_;
    while (!AtEnd() && (text_[at_] == ' ' || text_[at_] == '\t')) at_++;
    return at_ > before;
  }
  void SkipSpacesAndCommas() {
    while (!AtEnd() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == ',')) at_++;
  }
  bool Take(char c) {
    if (AtEnd() || text_[at_] != c) return false;
    at_++;
    return true;
  }
  // RFC 7230 token, in lower case; "" when there is none.
  std::string Token() {
    std::string token;
    while (!AtEnd() &&
           (std::isalnum(static_cast<unsigned char>(text_[at_])) ||
            std::strchr("!#$%&'*+-.^_`|~", text_[at_]) != nullptr) &&
           text_[at_] != '\0') {
      token += static_cast<char>(std::tolower(static_cast<unsigned char>(text_[at_++])));
    }
    return token;
  }
  // After the opening quote; false when it never closes.
  bool Quoted(std::string* value) {
    while (!AtEnd()) {
      char c = text_[at_++];
      if (c == '"') return true;
      if (c == '\\' && !AtEnd()) c = text_[at_++];
      value->push_back(c);
    }
    return false;
  }
  // A parameter's value without quotes: lenient, up to a comma or space, case kept.
  std::string Bare() {
    const size_t start = at_;
    while (!AtEnd() && text_[at_] != ',' && text_[at_] != ' ' && text_[at_] != '\t') at_++;
    return std::string(text_.substr(start, at_ - start));
  }

 private:
  const std::string_view text_;
  size_t at_ = 0;
};

// name=value; leaves the scanner where it was when there is none (a scheme follows, or nonsense).
bool TakeParam(Scanner* scanner, AuthChallenge* challenge, bool* broken) {
  const size_t start = scanner->position();
  const std::string name = scanner->Token();
  scanner->SkipSpaces();
  if (name.empty() || !scanner->Take('=')) {
    scanner->Rewind(start);
    return false;
  }
  scanner->SkipSpaces();
  std::string value;
  if (scanner->Take('"')) {
    *broken = !scanner->Quoted(&value);
  } else {
    value = scanner->Bare();
  }
  if (*broken) return false;
  if (challenge->params.size() < kMaxParams) challenge->params.emplace(name, std::move(value));
  return true;
}

}  // namespace

std::vector<AuthChallenge> ParseAuthChallenges(std::string_view header) {
  std::vector<AuthChallenge> challenges;
  Scanner scanner(header.substr(0, kMaxHeaderBytes));
  bool broken = false;
  while (!broken && challenges.size() < kMaxChallenges) {
    scanner.SkipSpacesAndCommas();
    AuthChallenge challenge;
    challenge.scheme = scanner.Token();
    if (challenge.scheme.empty()) break;
    if (!scanner.SkipSpaces() && !scanner.AtEnd()) break;
    while (TakeParam(&scanner, &challenge, &broken)) scanner.SkipSpacesAndCommas();
    if (!broken) challenges.push_back(std::move(challenge));
  }
  return challenges;
}

std::optional<AuthChallenge> ChooseChallenge(const std::vector<std::string>& headers) {
  std::optional<AuthChallenge> basic;
  for (const std::string& header : headers) {
    for (AuthChallenge& challenge : ParseAuthChallenges(header)) {
      const auto realm = challenge.params.find("realm");
      if (challenge.scheme == "bearer" && realm != challenge.params.end() && !realm->second.empty())
        return challenge;
      if (challenge.scheme == "basic" && !basic) basic = std::move(challenge);
    }
  }
  return basic;
}

}  // namespace holdfast::fetch
