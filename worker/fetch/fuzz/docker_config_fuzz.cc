#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "worker/fetch/authenticator.h"
#include "worker/fetch/credentials.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = holdfast::fetch::ParseDockerConfig(text);
  if (config.ok()) {
    for (const auto& [host, credentials] : config->auths) {
      if (credentials.empty()) std::abort();
    }
  }
  const auto helper = holdfast::fetch::ParseHelperAnswer(text);
  if (helper.ok() && helper->empty()) std::abort();
  const auto token = holdfast::fetch::ParseTokenAnswer(text);
  if (token.ok() && token->token.find_first_of("\r\n ") != std::string::npos) std::abort();
  return 0;
}
