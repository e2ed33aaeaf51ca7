// Requests on standard input and responses on standard output: one text line each, then bytes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

struct Request {
  std::string name;
  std::vector<int64_t> integers;
  std::vector<double> reals;
  std::vector<std::vector<char>> arrays;

  // Takes integers, reals or arrays in order.
  int64_t integer() { return integers.at(next_integer_++); }
  double real() { return reals.at(next_real_++); }
  template <class Array>
  void fill(Array& array) {
    for (auto& value : array) value = integer();
  }
  // Null for an empty array.
  template <class T>
  T* array() {
    std::vector<char>& bytes = arrays.at(next_array_++);
    return bytes.empty() ? nullptr : reinterpret_cast<T*>(bytes.data());
  }

 private:
  size_t next_integer_ = 0, next_real_ = 0, next_array_ = 0;
};

template <class T, class Read>
std::vector<T> read_list(const Read& read) {
  size_t size = 0;
  std::cin >> size;
  std::vector<T> values;
  for (size_t i = 0; i < size; ++i) values.push_back(read());
  return values;
}

template <class T>
T read_value() {
  T value{};
  std::cin >> value;
  return value;
}

// Reads "name, number of integers, integers, number of reals, reals, number of arrays, bytes of each array", and the
// arrays. Returns false at the end of the input.
inline bool read_request(Request& request) {
  request = Request{};
  if (!(std::cin >> request.name)) return false;
  request.integers = read_list<int64_t>(read_value<int64_t>);
  request.reals = read_list<double>(read_value<double>);
  const auto sizes = read_list<size_t>(read_value<size_t>);
  std::cin.get();
  for (const size_t size : sizes) {
    // Of exactly this size, so that the address sanitizer sees an access beyond it.
    std::vector<char> bytes(size);
    std::cin.read(bytes.data(), static_cast<std::streamsize>(size));
    request.arrays.push_back(std::move(bytes));
  }
  if (!std::cin) throw std::runtime_error("the request is incomplete");
  return true;
}

inline void respond(const void* data, size_t size) {
  std::printf("%zu\n", size);
  std::fwrite(data, 1, size, stdout);
}
