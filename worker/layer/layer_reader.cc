#include <utility>

#include "worker/layer/layer_impl.h"

namespace holdfast::layer {
namespace {

class LayerReaderImpl final : public LayerReader {
 public:
  explicit LayerReaderImpl(const LayerReaderOptions& options)
      : shared_(std::make_shared<ReaderShared>(options)) {}
  ~LayerReaderImpl() override {
    auto dropped = shared_->scheduler.Stop();
    shared_->pool->Stop();  // answers the reads that wait
  }

  std::shared_ptr<Layer> Open(std::shared_ptr<const LayerIndex> index,
                              std::shared_ptr<cache::LayerContent> content,
                              std::shared_ptr<cache::BlobSource> source, const std::string& origin) override {
    return std::make_shared<LayerImpl>(shared_, std::move(index), std::move(content), std::move(source),
                                       origin);
  }
  void Pause(bool paused) override { shared_->scheduler.Pause(paused); }

 private:
  const std::shared_ptr<ReaderShared> shared_;
};

}  // namespace

std::unique_ptr<LayerReader> LayerReader::Create(const LayerReaderOptions& options) {
  return std::make_unique<LayerReaderImpl>(options);
}

}  // namespace holdfast::layer
