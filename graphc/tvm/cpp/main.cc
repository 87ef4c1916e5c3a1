// Runs the model in a folder that graphc compiled:  runner FOLDER [RUNS]
// It maps the weights, runs the inputs that came with the model, compares with the results that came with them, and
// says how long a run takes. Copy from here what your program needs.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

namespace {

json::Object Object(const ffi::Any& value) { return value.cast<json::Object>(); }
json::Array Array(const ffi::Any& value) { return value.cast<json::Array>(); }
std::string Text(const ffi::Any& value) { return value.cast<ffi::String>(); }

DLDataType Type(const std::string& name) {
  if (name == "bool") return {kDLBool, 8, 1};
  size_t digits = name.find_first_of("0123456789");
  std::string kind = name.substr(0, digits);
  uint8_t code = kind == "float" ? kDLFloat : kind == "uint" ? kDLUInt : kDLInt;
  return {code, static_cast<uint8_t>(std::stoi(name.substr(digits))), 1};
}

// The tensors of a data file, which stays mapped for as long as the program runs.
std::vector<ffi::Tensor> Tensors(const std::string& path, const json::Array& entries) {
  int file = open(path.c_str(), O_RDONLY);
  struct stat about;
  if (file < 0 || fstat(file, &about) != 0) throw std::runtime_error("cannot open " + path);
  // Private and writable: the kernels only read, but tensors cannot say so.
  void* memory = mmap(nullptr, about.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  std::vector<ffi::Tensor> found;
  for (const ffi::Any& item : entries) {
    json::Object entry = Object(item);
    json::Array sizes = Array(entry["shape"]);
    auto* shape = new std::vector<int64_t>;
    for (const ffi::Any& size : sizes) shape->push_back(size.cast<int64_t>());
    auto* managed = new DLManagedTensor{};
    managed->dl_tensor.data = static_cast<char*>(memory) + entry["offset"].cast<int64_t>();
    managed->dl_tensor.device = {kDLCPU, 0};
    managed->dl_tensor.ndim = static_cast<int>(shape->size());
    managed->dl_tensor.dtype = Type(Text(entry["dtype"]));
    managed->dl_tensor.shape = shape->data();
    managed->manager_ctx = shape;
    managed->deleter = [](DLManagedTensor* self) {
      delete static_cast<std::vector<int64_t>*>(self->manager_ctx);
      delete self;
    };
    found.push_back(ffi::Tensor::FromDLPack(managed));
  }
  close(file);
  return found;
}

double Error(const ffi::Tensor& found, const ffi::Tensor& wanted) {
  double worst = 0, largest = 1e-30;
  const DLTensor *a = found.GetDLTensorPtr(), *b = wanted.GetDLTensorPtr();
  int64_t count = 1;
  for (int i = 0; i < b->ndim; ++i) count *= b->shape[i];
  for (int64_t i = 0; i < count; ++i) {
    double x = 0, y = 0;
    if (b->dtype.code == kDLFloat && b->dtype.bits == 32) {
      x = static_cast<const float*>(a->data)[i];
      y = static_cast<const float*>(b->data)[i];
    } else {
      size_t bytes = b->dtype.bits / 8;
      bool same = std::equal(static_cast<const char*>(a->data) + i * bytes,
                             static_cast<const char*>(a->data) + (i + 1) * bytes,
                             static_cast<const char*>(b->data) + i * bytes);
      x = same ? 0 : 1;
    }
    worst = std::max(worst, std::abs(x - y));
    largest = std::max(largest, std::abs(y));
  }
  return worst / largest;
}

double Seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

int Run(const std::string& folder, int runs) {
  double start = Seconds();
  if (dlopen((folder + "/libtvm_runtime.so").c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr)
    throw std::runtime_error(dlerror());
  std::ifstream file(folder + "/graphc.json");
  std::stringstream text;
  text << file.rdbuf();
  json::Object runtime = Object(Object(json::Parse(text.str()))["runtime"]);
  json::Object data = Object(runtime["data"]);
  auto weights = Tensors(folder + "/weights.bin", Array(data["weights.bin"]));
  auto parity = Tensors(folder + "/parity.bin", Array(data["parity.bin"]));
  double worst = 0;
  for (const ffi::Any& item : Array(runtime["buckets"])) {
    json::Object bucket = Object(item);
    ffi::Module library = ffi::Module::LoadFromFile(folder + "/" + Text(bucket["library"]));
    ffi::Module machine =
        library->GetFunction("vm_load_executable", true).value()().cast<ffi::Module>();
    // A CPU, its first, with a pool of buffers.
    machine->GetFunction("vm_initialization", true).value()(static_cast<int>(kDLCPU), 0, 2);
    ffi::Function main = machine->GetFunction("main", true).value();
    json::Array known = Array(bucket["parity"]);
    json::Object inputs = Object(known[0]), outputs = Object(known[1]);
    std::vector<ffi::Any> held;
    for (const ffi::Any& input : Array(bucket["inputs"]))
      held.push_back(parity[inputs[Object(input)["name"]].cast<int64_t>()]);
    for (const ffi::Any& number : Array(bucket["weights"]))
      held.push_back(weights[number.cast<int64_t>()]);
    std::vector<ffi::AnyView> arguments(held.begin(), held.end());
    ffi::Any result;
    main.CallPacked(ffi::PackedArgs(arguments.data(), arguments.size()), &result);
    std::cout << "loaded and run in " << Seconds() - start << " s\n";
    std::vector<ffi::Tensor> found;
    if (auto one = result.try_cast<ffi::Tensor>()) {
      found.push_back(*one);
    } else {
      for (const ffi::Any& each : result.cast<ffi::Array<ffi::Any>>())
        found.push_back(each.cast<ffi::Tensor>());
    }
    json::Array names = Array(bucket["outputs"]);
    for (size_t i = 0; i < found.size(); ++i) {
      double error = Error(found[i], parity[outputs[names[i]].cast<int64_t>()]);
      std::cout << Text(names[i]) << ": relative error " << error << "\n";
      worst = std::max(worst, error);
    }
    start = Seconds();
    for (int i = 0; i < runs; ++i)
      main.CallPacked(ffi::PackedArgs(arguments.data(), arguments.size()), &result);
    std::cout << 1e3 * (Seconds() - start) / runs << " ms a run\n";
  }
  return worst <= 1e-4 ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  try {
    return Run(count > 1 ? words[1] : ".", count > 2 ? std::atoi(words[2]) : 10);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
