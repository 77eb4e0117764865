// Every message of the protocols, as bytes that were once released: later builds must still read them, and
// find in them what was meant (schema/README.md). tests/golden/messages holds one file a message: a line of
// bytes (hex of the flat message), then a line for each field with its value.
//
// A message or field that no file has fails the test, which then prints the file to add. Files are never
// changed: a message that has grown gets a further file (Name.2.txt).
#include <capnp/any.h>
#include <capnp/dynamic.h>
#include <capnp/message.h>
#include <capnp/schema.h>
#include <capnp/serialize.h>
#include <dirent.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_split.h"
#include "common/io.h"
#include "gtest/gtest.h"
#include "schema/admin.capnp.h"
#include "schema/control.capnp.h"
#include "schema/handover.capnp.h"
#include "schema/mount_blob.capnp.h"

namespace holdfast::handover {
namespace {

using capnp::DynamicList;
using capnp::DynamicStruct;
using capnp::DynamicValue;
using Type = capnp::schema::Type;

std::string NameOf(capnp::Schema schema) {
  std::string name = schema.getProto().getDisplayName().cStr();
  name = name.substr(name.rfind('/') == std::string::npos ? 0 : name.rfind('/') + 1);
  std::string safe;
  for (char c : name) safe += c == ':' || c == '$' ? '-' : c;
  return safe;
}

// All structs that can be reached from the interfaces: parameters, results, and what lies in them.
class Messages {
 public:
  void AddInterface(capnp::InterfaceSchema interface) {
    if (!seen_.insert(interface.getProto().getId()).second) return;
    for (auto method : interface.getMethods()) {
      AddStruct(method.getParamType());
      AddStruct(method.getResultType());
    }
  }
  void AddStruct(capnp::StructSchema schema) {
    if (!seen_.insert(schema.getProto().getId()).second) return;
    if (schema.getFields().size() > 0) all.emplace(NameOf(schema), schema);
    for (auto field : schema.getFields()) AddType(field.getType());
  }

  std::map<std::string, capnp::StructSchema> all;

 private:
  void AddType(capnp::Type type) {
    if (type.isStruct()) AddStruct(type.asStruct());
    if (type.isList()) AddType(type.asList().getElementType());
    if (type.isInterface()) AddInterface(type.asInterface());
  }
  std::set<uint64_t> seen_;
};

const Messages& AllMessages() {
  static const Messages* messages = [] {
    auto* made = new Messages();
    made->AddInterface(capnp::Schema::from<schema::Supervisor>());
    made->AddInterface(capnp::Schema::from<schema::Worker>());
    made->AddInterface(capnp::Schema::from<schema::Control>());
    made->AddInterface(capnp::Schema::from<schema::WorkerAdmin>());
    made->AddStruct(capnp::Schema::from<schema::MountBlob>());
    return made;
  }();
  return *messages;
}

// Fills every field with a value that tells it from its neighbours and from its default.
class Filler {
 public:
  void Fill(DynamicStruct::Builder out, int depth = 0) {
    for (auto field : out.getSchema().getFields()) {
      const capnp::Type type = field.getType();
      const uint64_t number = ++count_;
      if (type.isStruct()) {
        if (depth < kDeepest) Fill(out.init(field).as<DynamicStruct>(), depth + 1);
      } else if (type.isList()) {
        if (depth < kDeepest) FillList(out.init(field, 2).as<DynamicList>(), type.asList(), depth);
      } else if (type.isInterface()) {
        out.set(field, Client(type.asInterface()));
      } else if (type.isAnyPointer()) {
        out.set(field, Client(capnp::Schema::from<schema::WorkerAdmin>()));
      } else if (type.isData()) {
        const std::string bytes = std::string("\x00\xff", 2) + std::to_string(number);
        out.set(field, capnp::Data::Reader(reinterpret_cast<const kj::byte*>(bytes.data()), bytes.size()));
      } else {
        out.set(field, Scalar(type, number));
      }
    }
  }

 private:
  static constexpr int kDeepest = 3;

  // A null capability would not be written at all.
  class Nobody final : public capnp::Capability::Server {
   public:
    DispatchCallResult dispatchCall(uint64_t interface, uint16_t method,
                                    capnp::CallContext<capnp::AnyPointer, capnp::AnyPointer>) override {
      return internalUnimplemented("nobody", interface, method);
    }
  };
  static DynamicValue::Reader Client(capnp::InterfaceSchema interface) {
    return DynamicValue::Reader(
        capnp::Capability::Client(kj::heap<Nobody>()).castAs<capnp::DynamicCapability>(interface));
  }
  DynamicValue::Reader Scalar(capnp::Type type, uint64_t number) {
    switch (type.which()) {
      case Type::TEXT:
        texts_.push_back(std::make_unique<std::string>("text " + std::to_string(number)));
        return DynamicValue::Reader(texts_.back()->c_str());
      case Type::BOOL:
        return DynamicValue::Reader(true);
      case Type::ENUM: {
        auto enumerants = type.asEnum().getEnumerants();
        return capnp::DynamicEnum(enumerants[enumerants.size() - 1]);
      }
      default:
        return DynamicValue::Reader(number + 100);
    }
  }
  void FillList(DynamicList::Builder out, capnp::ListSchema type, int depth) {
    for (unsigned i = 0; i < out.size(); ++i) {
      const uint64_t number = ++count_;
      if (type.getElementType().isStruct()) {
        Fill(out[i].as<DynamicStruct>(), depth + 1);
      } else if (type.getElementType().isData()) {
        const std::string bytes = std::to_string(number);
        out.set(i, capnp::Data::Reader(reinterpret_cast<const kj::byte*>(bytes.data()), bytes.size()));
      } else {
        out.set(i, Scalar(type.getElementType(), number));
      }
    }
  }

  uint64_t count_ = 0;
  std::vector<std::unique_ptr<std::string>> texts_;
};

// "path = value" of everything that is not at its default.
void Flatten(DynamicValue::Reader value, const std::string& path, std::set<std::string>* lines) {
  switch (value.getType()) {
    case DynamicValue::STRUCT: {
      auto object = value.as<DynamicStruct>();
      for (auto field : object.getSchema().getFields()) {
        if (!object.has(field, capnp::HasMode::NON_DEFAULT)) continue;
        const std::string name = field.getProto().getName().cStr();
        const capnp::Type type = field.getType();
        if (type.isInterface() || type.isAnyPointer()) {
          lines->insert(path + name + " = capability");
        } else {
          Flatten(object.get(field), path + name, lines);
        }
      }
      break;
    }
    case DynamicValue::LIST: {
      auto list = value.as<DynamicList>();
      for (unsigned i = 0; i < list.size(); ++i) Flatten(list[i], path + "." + std::to_string(i), lines);
      break;
    }
    case DynamicValue::DATA: {
      auto data = value.as<capnp::Data>();
      const std::string bytes(data.begin(), data.end());
      lines->insert(path + " = " + std::string(absl::BytesToHexString(ToAbsl(bytes))));
      break;
    }
    case DynamicValue::BOOL:
      lines->insert(path + " = " + (value.as<bool>() ? "true" : "false"));
      break;
    case DynamicValue::TEXT:
      lines->insert(path + " = " + value.as<capnp::Text>().cStr());
      break;
    case DynamicValue::ENUM:
      lines->insert(path + " = #" + std::to_string(value.as<capnp::DynamicEnum>().getRaw()));
      break;
    case DynamicValue::UINT:
      lines->insert(path + " = " + std::to_string(value.as<uint64_t>()));
      break;
    case DynamicValue::INT:
      lines->insert(path + " = " + std::to_string(value.as<int64_t>()));
      break;
    default:
      lines->insert(path + " = ?");
  }
}

std::set<std::string> Lines(DynamicStruct::Reader message) {
  std::set<std::string> lines;
  for (auto field : message.getSchema().getFields()) {
    if (!message.has(field, capnp::HasMode::NON_DEFAULT)) continue;
    const std::string name = field.getProto().getName().cStr();
    const capnp::Type type = field.getType();
    if (type.isInterface() || type.isAnyPointer()) {
      lines.insert(name + " = capability");
    } else {
      Flatten(message.get(field), name + (type.isStruct() ? "." : ""), &lines);
    }
  }
  return lines;
}

// The text of a golden file for a message with every field set.
std::string MakeGolden(capnp::StructSchema schema) {
  capnp::MallocMessageBuilder message(64 * 1024);
  capnp::BuilderCapabilityTable table;
  auto root = table.imbue(message.initRoot<capnp::AnyPointer>());
  Filler filler;
  auto object = root.initAs<DynamicStruct>(schema);
  filler.Fill(object);
  kj::Array<capnp::word> words = capnp::messageToFlatArray(message);
  kj::ArrayPtr<kj::byte> bytes = words.asBytes();
  std::string text =
      std::string(absl::BytesToHexString(ToAbsl(std::string(bytes.begin(), bytes.end())))) + "\n";
  for (const std::string& line : Lines(object.asReader())) text += line + "\n";
  return text;
}

struct Golden {
  std::string file;
  std::string bytes;
  std::set<std::string> lines;
};

std::string Folder() {
  const char* source = std::getenv("HOLDFAST_SOURCE");
  EXPECT_NE(source, nullptr);
  return std::string(source == nullptr ? "." : source) + "/tests/golden/messages";
}

// By message: "Name.txt" and "Name.2.txt" are both of Name.
std::multimap<std::string, Golden> ReadGoldens() {
  std::multimap<std::string, Golden> goldens;
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(Folder().c_str()), closedir);
  if (dir == nullptr) return goldens;
  while (const dirent* entry = readdir(dir.get())) {
    Golden golden;
    golden.file = entry->d_name;
    if (golden.file.size() < 5 || golden.file.substr(golden.file.size() - 4) != ".txt") continue;
    std::string name = golden.file.substr(0, golden.file.size() - 4);
    const size_t dot = name.rfind('.');
    if (dot != std::string::npos && name.find_first_not_of("0123456789", dot + 1) == std::string::npos) {
      name = name.substr(0, dot);
    }
    const std::string text = ReadFile(Folder() + "/" + golden.file).value();
    std::vector<std::string> lines = absl::StrSplit(text, '\n', absl::SkipEmpty());
    golden.bytes = std::string(absl::HexStringToBytes(lines.at(0)));
    golden.lines.insert(lines.begin() + 1, lines.end());
    goldens.emplace(name, std::move(golden));
  }
  return goldens;
}

std::set<std::string> Decode(capnp::StructSchema schema, const std::string& bytes) {
  auto words = kj::heapArray<capnp::word>(bytes.size() / sizeof(capnp::word));
  memcpy(words.begin(), bytes.data(), words.asBytes().size());
  capnp::FlatArrayMessageReader message(words);
  kj::Vector<kj::Maybe<kj::Own<capnp::ClientHook>>> none;
  capnp::ReaderCapabilityTable table(none.releaseAsArray());
  auto root = table.imbue(message.getRoot<capnp::AnyPointer>());
  return Lines(root.getAs<DynamicStruct>(schema));
}

// "entries.0.blob = 00" -> "blob": fields of nested structs are those structs' own matter.
std::set<std::string> FieldsOf(const std::set<std::string>& lines) {
  std::set<std::string> fields;
  for (const std::string& line : lines) fields.insert(line.substr(0, line.find_first_of(". ")));
  return fields;
}

TEST(MessageGoldenTest, BytesOfEveryReleaseStillMeanWhatTheyMeant) {
  std::multimap<std::string, Golden> goldens = ReadGoldens();
  ASSERT_FALSE(goldens.empty());
  for (const auto& [name, golden] : goldens) {
    SCOPED_TRACE(golden.file);
    auto schema = AllMessages().all.find(name);
    if (schema == AllMessages().all.end()) {
      ADD_FAILURE() << "a released message is gone from the schema";
      continue;
    }
    EXPECT_EQ(Decode(schema->second, golden.bytes), golden.lines);
  }
}

TEST(MessageGoldenTest, EveryMessageAndEachOfItsFieldsHasReleasedBytes) {
  std::multimap<std::string, Golden> goldens = ReadGoldens();
  EXPECT_GT(AllMessages().all.size(), 30u);
  for (const auto& [name, schema] : AllMessages().all) {
    std::set<std::string> known;
    auto [first, last] = goldens.equal_range(name);
    for (auto it = first; it != last; ++it) known.merge(FieldsOf(it->second.lines));
    for (auto field : schema.getFields()) {
      const std::string field_name = field.getProto().getName().cStr();
      if (known.count(field_name) != 0) continue;
      ADD_FAILURE() << name << "." << field_name << " has no golden bytes; add "
                    << "tests/golden/messages/" << name << (first == last ? "" : ".N") << ".txt:\n"
                    << MakeGolden(schema);
      break;
    }
  }
}

// On the wire a SwapStatus is a SwapStep that has grown: more words, more pointers.
TEST(MessageGoldenTest, FieldsFromTheFutureAreNotSeenAndHurtNobody) {
  capnp::MallocMessageBuilder message;
  auto grown = message.initRoot<schema::SwapStatus>();
  grown.setKind("name");
  grown.setFinishedWallNanos(7);
  grown.setResult("detail");
  grown.setPauseNanos(8);
  grown.setFromBuild("from the future");
  kj::Array<capnp::word> words = capnp::messageToFlatArray(message);
  kj::ArrayPtr<kj::byte> bytes = words.asBytes();
  EXPECT_EQ(Decode(capnp::Schema::from<schema::SwapStep>(), std::string(bytes.begin(), bytes.end())),
            (std::set<std::string>{"name = name", "nanos = 7", "detail = detail"}));
}

}  // namespace
}  // namespace holdfast::handover
