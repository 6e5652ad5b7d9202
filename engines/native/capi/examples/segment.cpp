// Segment a grey picture: segment_cpp LIBRARY IMAGE.pgm LABELS.pgm [ENGINE] [K]
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <recallseg.hpp>

namespace {

struct Picture {
  int64_t rows = 0, columns = 0;
  std::vector<uint8_t> pixels;
};

Picture read_pgm(const std::string& path) {
  Picture picture;
  std::string magic;
  int most = 0;
  std::ifstream file(path, std::ios::binary);
  file >> magic >> picture.columns >> picture.rows >> most;
  file.get();
  if (!file || magic != "P5" || most != 255 || picture.rows < 1 || picture.columns < 1 ||
      picture.rows > RECALLSEG_MAX_SIDE || picture.columns > RECALLSEG_MAX_SIDE)
    throw std::runtime_error(path + ": not a binary PGM of 8 bits");
  picture.pixels.resize(static_cast<std::size_t>(picture.rows * picture.columns));
  file.read(reinterpret_cast<char*>(picture.pixels.data()),
            static_cast<std::streamsize>(picture.pixels.size()));
  if (!file) throw std::runtime_error(path + ": cut short");
  return picture;
}

void write_pgm(const std::string& path, const Picture& picture) {
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << picture.columns << ' ' << picture.rows << "\n255\n";
  file.write(reinterpret_cast<const char*>(picture.pixels.data()),
             static_cast<std::streamsize>(picture.pixels.size()));
  if (!file.flush()) throw std::runtime_error(path + ": not written");
}

void run(int argc, char** argv) {
  const Picture picture = read_pgm(argv[2]);
  Picture labels = picture;

  recallseg::init();
  const auto library = recallseg::Library::open(argv[1]);
  auto options = recallseg::sized<recallseg_segmenter_options>();
  if (argc > 4) options.engine = argv[4];
  if (argc > 5) options.k = std::atoi(argv[5]);
  const auto segmenter = library.segmenter(&options);

  auto output = recallseg::sized<recallseg_output>();
  output.rows = picture.rows;
  output.columns = picture.columns;
  output.label_map = labels.pixels.data();
  const auto result = segmenter.segment(
      recallseg::image(picture.pixels.data(), RECALLSEG_UINT8, picture.rows, picture.columns),
      output, 60e3);
  for (std::size_t i = 0; i < result.summary().structure_count; ++i)
    std::cout << result.score(i).structure << ": " << result.score(i).pixels << " px\n";
  write_pgm(argv[3], labels);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: " << argv[0] << " LIBRARY IMAGE.pgm LABELS.pgm [ENGINE] [K]\n";
    return 2;
  }
  try {
    run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
