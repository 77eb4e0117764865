// Random TOCs, against a model that does the same in the plainest way: paths in a std::map.
#include <sys/stat.h>

#include <map>
#include <random>
#include <set>

#include "gtest/gtest.h"
#include "worker/layer/index_test_support.h"

namespace holdfast::layer {
namespace {

using toc::Type;

struct Model {
  struct Item {
    Type type = Type::kDirectory;
    int entry = -1;  // -1: implied
    bool opaque = false;
    std::string target;
  };
  std::map<std::string, Item> items = {{"", Item{}}};
  std::set<std::string> whiteouts;
  bool bad = false;

  static std::string Parent(const std::string& path) {
    size_t slash = path.rfind('/');
    return slash == std::string::npos ? "" : path.substr(0, slash);
  }
  static std::string Base(const std::string& path) { return path.substr(path.rfind('/') + 1); }
  static std::string Join(const std::string& folder, const std::string& name) {
    return folder.empty() ? name : folder + "/" + name;
  }

  void DropBelow(const std::string& path) {
    std::erase_if(items, [&](const auto& item) { return item.first.starts_with(path + "/"); });
    std::erase_if(whiteouts, [&](const auto& name) { return name.starts_with(path + "/"); });
  }
  bool MakeFolders(const std::string& path) {
    if (path.empty()) return true;
    if (!MakeFolders(Parent(path))) return false;
    auto [item, fresh] = items.try_emplace(path);
    return item->second.type == Type::kDirectory;
  }
  void Apply(const toc::Entry& entry, int number) {
    if (bad) return;
    if (entry.name.empty()) {
      items[""].entry = number;
      return;
    }
    std::string folder = Parent(entry.name), base = Base(entry.name);
    if (!MakeFolders(folder)) {
      bad = true;
    } else if (base == ".wh..wh..opq") {
      items[folder].opaque = true;
    } else if (base.starts_with(".wh.")) {
      whiteouts.insert(Join(folder, base.substr(4)));
    } else {
      auto found = items.find(entry.name);
      if (found != items.end() && found->second.type == Type::kDirectory && entry.type == Type::kDirectory) {
        found->second.entry = number;
        return;
      }
      DropBelow(entry.name);
      items[entry.name] = Item{entry.type, number, false, entry.link_target};
    }
  }
  // The path of the node that `path` names in the end; "" if there is none.
  std::string Resolve(std::string path) const {
    for (size_t steps = 0; steps <= items.size(); steps++) {
      auto found = items.find(path);
      if (found == items.end() || found->second.type == Type::kDirectory) return "";
      if (found->second.type != Type::kHardlink) return path;
      path = found->second.target;
    }
    return "";
  }
  bool Valid() const {
    if (bad) return false;
    for (const auto& [path, item] : items) {
      if (item.type == Type::kHardlink && Resolve(path).empty()) return false;
    }
    return true;
  }
};

int Roll(std::mt19937& random, int sides) {
  return static_cast<int>(random() % static_cast<uint32_t>(sides));
}

std::string RandomPath(std::mt19937& random) {
  std::string path;
  for (int depth = Roll(random, 3); depth >= 0; depth--)
    path = Model::Join(path, std::string(1, static_cast<char>('a' + Roll(random, 3))));
  return path;
}

toc::Entry RandomEntry(std::mt19937& random, uint32_t number) {
  std::string path = RandomPath(random);
  int kind = Roll(random, 20);
  if (kind < 7) return MakeFolder(path, number);
  if (kind < 12) return MakeFile(path, random() % 3 * 3000, random() % 1000, number);
  if (kind < 14) return MakeLink(path, Type::kHardlink, RandomPath(random));
  if (kind == 14) return MakeFile(Model::Join(Model::Parent(path), ".wh." + Model::Base(path)));
  if (kind == 15) return MakeFile(Model::Join(path, ".wh..wh..opq"));
  if (kind == 16) return MakeFolder("", number);
  toc::Entry entry = MakeEntry(path, kind == 17 ? Type::kSymlink : Type::kFifo, number);
  if (kind == 17) entry.link_target = RandomPath(random);
  return entry;
}

void CheckItem(const Model& model, const LayerIndex& index, const std::vector<toc::Entry>& entries,
               const std::string& path) {
  const Model::Item& item = model.items.at(path);
  uint64_t id = index.LookupPath(path);
  ASSERT_NE(id, 0u) << path;
  const NodeRecord& node = *index.node(id);
  if (item.type == Type::kHardlink) {
    EXPECT_EQ(id, index.LookupPath(model.Resolve(path))) << path;
    return;
  }
  EXPECT_EQ(node.parent, index.LookupPath(Model::Parent(path))) << path;
  EXPECT_EQ((node.flags & kNodeImplied) != 0, item.entry < 0) << path;
  EXPECT_EQ((node.flags & kNodeOpaque) != 0, item.opaque) << path;
  if (item.entry >= 0) {
    const toc::Entry& entry = entries[static_cast<size_t>(item.entry)];
    EXPECT_EQ(node.uid, entry.uid) << path;
    if (entry.type == Type::kRegular) {
      EXPECT_EQ(node.size, entry.size) << path;
    }
    if (entry.type == Type::kSymlink) {
      EXPECT_EQ(index.link_target(node), entry.link_target) << path;
    }
  }
  uint32_t links = item.type == Type::kDirectory ? 2 : 0;
  for (const auto& [other, value] : model.items) {
    if (item.type != Type::kDirectory) links += model.Resolve(other) == path ? 1 : 0;
    if (item.type == Type::kDirectory && !other.empty() && value.type == Type::kDirectory &&
        Model::Parent(other) == path)
      links++;
  }
  EXPECT_EQ(node.nlink, links) << path;
}

// All paths that the index shows, by walking it.
void Walk(const LayerIndex& index, uint64_t folder, const std::string& path, std::set<std::string>* seen) {
  for (const ChildRecord& child : index.children(folder)) {
    std::string name = Model::Join(path, std::string(index.name(child)));
    EXPECT_TRUE(seen->insert(name).second);
    EXPECT_EQ(index.Lookup(folder, index.name(child)), child.nodeid);
    if (S_ISDIR(index.node(child.nodeid)->mode)) Walk(index, child.nodeid, name, seen);
  }
}

TEST(LayerIndexModelTest, RandomTocsGiveWhatThePlainModelGives) {
  std::mt19937 random(20261122);
  int good = 0, bad = 0;
  for (int round = 0; round < 20'000; round++) {
    std::vector<toc::Entry> entries;
    Model model;
    int count = Roll(random, 14);
    for (int i = 0; i < count; i++) {
      entries.push_back(RandomEntry(random, static_cast<uint32_t>(i + 1)));
      model.Apply(entries.back(), i);
    }
    auto built = TryBuild(entries);
    ASSERT_EQ(built.ok(), model.Valid()) << "round " << round << ": " << built.status();
    (built.ok() ? good : bad)++;
    if (!built.ok()) continue;
    auto index = LayerIndex::FromBytes(built->bytes);
    ASSERT_TRUE(index.ok()) << index.status();
    std::set<std::string> seen, expected;
    Walk(**index, kRootNode, "", &seen);
    for (const auto& [path, item] : model.items) {
      CheckItem(model, **index, entries, path);
      if (!path.empty()) expected.insert(path);
    }
    for (const std::string& path : model.whiteouts) {
      if (expected.insert(path).second) {
        EXPECT_EQ(NodeAt(**index, path).mode, uint32_t{S_IFCHR}) << path;
      }
    }
    EXPECT_EQ(seen, expected) << "round " << round;
    EXPECT_EQ(TryBuild(entries)->sha256, built->sha256);
    if (HasFailure()) break;
  }
  EXPECT_GT(good, 2000);
  EXPECT_GT(bad, 2000);
}

}  // namespace
}  // namespace holdfast::layer
