// The Python face of policies/policy.h. Arguments are read whole before a policy is asked, as reading them may run any Python code.
#include "../policies/gittins.h"
#include "../policies/policy.h"
#include "bindings.h"

#include <cmath>

namespace pagemill {

static int64_t integer_of(nb::handle value, const char* name) {
    const long long found = PyLong_AsLongLong(value.ptr());
    if (found == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw nb::python_error();
        PyErr_Clear();
        throw std::invalid_argument(std::string(name) + " is out of range");
    }
    return found;
}

static int64_t block_of(nb::handle value) {
    const int64_t block = integer_of(value, "a block");
    require(block >= 0 && block <= kMostBlock, "a block is a number from 0 to 2^62");
    return block;
}

static Key key_of(nb::handle value) {
    if (!PyBytes_Check(value.ptr())) throw nb::type_error("a key is bytes");
    char* bytes = nullptr;
    Py_ssize_t count = 0;
    if (PyBytes_AsStringAndSize(value.ptr(), &bytes, &count)) throw nb::python_error();
    require(count >= 1 && size_t(count) <= kMostKeyBytes, "a key has 1 to 32 bytes");
    return Key(bytes, size_t(count));
}

// The names of BlockInfo's fields, once.
struct FieldNames {
    PyObject* num_tokens = PyUnicode_InternFromString("num_tokens");
    PyObject* depth = PyUnicode_InternFromString("depth");
    PyObject* num_bytes = PyUnicode_InternFromString("num_bytes");
    PyObject* text_tokens = PyUnicode_InternFromString("text_tokens");
    PyObject* num_known_blocks = PyUnicode_InternFromString("num_known_blocks");
    PyObject* recompute_cost = PyUnicode_InternFromString("recompute_cost");
};

static nb::object field_of(nb::handle info, PyObject* name) {
    PyObject* found = PyObject_GetAttr(info.ptr(), name);
    if (!found) throw nb::python_error();
    return nb::steal(found);
}

static BlockInfo info_of(nb::handle value, unsigned fields) {
    static const FieldNames names;
    BlockInfo info;
    if (fields & kNumTokens) info.num_tokens = integer_of(field_of(value, names.num_tokens), "num_tokens");
    if (fields & kDepth) info.depth = integer_of(field_of(value, names.depth), "depth");
    if (fields & kNumBytes) info.num_bytes = integer_of(field_of(value, names.num_bytes), "num_bytes");
    if (fields & kTextTokens) info.text_tokens = integer_of(field_of(value, names.text_tokens), "text_tokens");
    if (fields & kNumKnownBlocks) info.num_known_blocks = integer_of(field_of(value, names.num_known_blocks), "num_known_blocks");
    if (fields & kRecomputeCost) {
        info.recompute_cost = PyFloat_AsDouble(field_of(value, names.recompute_cost).ptr());
        if (info.recompute_cost == -1 && PyErr_Occurred()) throw nb::python_error();
        require(std::isfinite(info.recompute_cost), "recompute_cost is not finite");
    }
    return info;
}

// Each element of a sequence, held while it is read; read(element) may run Python code, the sequence changed by it included.
template <class T, class Read> static std::vector<T> all_of(nb::handle sequence, const char* what, Read read) {
    const nb::object items = nb::steal(PySequence_Fast(sequence.ptr(), what));
    if (!items.is_valid()) throw nb::python_error();
    const bool is_list = PyList_Check(items.ptr());
    std::vector<T> found;
    const Py_ssize_t count = is_list ? PyList_Size(items.ptr()) : PyTuple_Size(items.ptr());
    found.reserve(size_t(count));
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject* item = is_list ? PyList_GetItem(items.ptr(), i) : PyTuple_GetItem(items.ptr(), i);
        if (!item) throw nb::python_error();
        const nb::object held = nb::borrow(item);
        found.push_back(read(held));
    }
    return found;
}

static std::vector<int64_t> blocks_of(nb::handle sequence) { return all_of<int64_t>(sequence, "blocks are a sequence", block_of); }

// A run of blocks as callers give it.
struct Run {
    std::vector<int64_t> blocks;
    std::vector<Key> keys;
    std::vector<BlockInfo> infos;

    Run(nb::handle blocks_, nb::handle keys_, nb::handle infos_, unsigned fields)
        : blocks(blocks_of(blocks_)), keys(all_of<Key>(keys_, "keys are a sequence", key_of)),
          infos(all_of<BlockInfo>(infos_, "infos are a sequence", [fields](nb::handle info) { return info_of(info, fields); })) {
        require(keys.size() == blocks.size() && infos.size() == blocks.size(), "a key and an info for each block");
    }
};

static bool contains(const Policy& policy, nb::handle block) {
    if (!PyLong_Check(block.ptr())) return false;
    int overflow = 0;
    const long long found = PyLong_AsLongLongAndOverflow(block.ptr(), &overflow);
    return !overflow && policy.contains(found);
}

static nb::object victim(Policy& policy) {
    const int64_t block = policy.victim();
    return block < 0 ? nb::none() : nb::object(nb::int_(block));
}

static nb::list replace(Policy& policy, nb::handle blocks, nb::handle keys, nb::handle infos) {
    const Run run(blocks, keys, infos, policy.fields());
    const std::vector<int64_t> victims = policy.replace(run.blocks, run.keys, run.infos);
    nb::list found;
    for (const int64_t each : victims) found.append(nb::int_(each));
    return found;
}

static nb::dict constants_of_gittins() {
    const GittinsSetting setting;
    const LearnerSetting& learner = setting.learner;
    nb::dict all, learned;
    all["lengths"] = setting.lengths;
    all["once"] = setting.once;
    all["part_filled"] = setting.part_filled;
    all["continued"] = setting.continued;
    all["again"] = setting.again;
    all["known_blocks"] = setting.known_blocks;
    learned["first_edge"] = learner.first_edge;
    learned["num_edges"] = learner.num_edges;
    learned["half_life"] = learner.half_life;
    learned["shape_weight"] = learner.shape_weight;
    learned["level_weight"] = learner.level_weight;
    learned["group_weight"] = learner.group_weight;
    learned["prior_hazard"] = learner.prior_hazard;
    learned["prior_age"] = learner.prior_age;
    all["learner"] = learned;
    return all;
}

void bind_policies(nb::module_& m) {
    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const Refused& refused) {
            PyErr_SetString(PyExc_AssertionError, refused.what());
        }
    });
    nb::class_<Policy>(m, "NativePolicy")
        .def("__init__", [](Policy* self, const std::string& name, nb::handle capacity) { new (self) Policy(name, integer_of(capacity, "a capacity")); },
             "name"_a, "capacity"_a)
        .def_prop_ro("name", [](const Policy& p) { return p.name(); })
        .def_prop_ro("leader", [](const Policy& p) { return p.leader(); })
        .def("__contains__", &contains, "block"_a.none())
        .def("__deepcopy__", [](const Policy& p, nb::handle) { return Policy(p); }, "memo"_a)
        .def("insert", [](Policy& p, nb::handle block, nb::handle key, nb::handle info) { p.insert(block_of(block), key_of(key), info_of(info, p.fields())); },
             "block"_a, "key"_a, "info"_a)
        .def("touch", [](Policy& p, nb::handle block) { p.touch(block_of(block)); }, "block"_a)
        .def("lock", [](Policy& p, nb::handle block) { p.lock(block_of(block)); }, "block"_a)
        .def("unlock", [](Policy& p, nb::handle block) { p.unlock(block_of(block)); }, "block"_a)
        .def("victim", &victim)
        .def("remove", [](Policy& p, nb::handle block, bool evicted) { p.remove(block_of(block), evicted); }, "block"_a, "evicted"_a)
        .def("on_miss", [](Policy& p, nb::handle key) { p.on_miss(key_of(key)); }, "key"_a)
        .def("touch_all", [](Policy& p, nb::handle blocks) { p.touch_all(blocks_of(blocks)); }, "blocks"_a)
        .def("replace", &replace, "blocks"_a, "keys"_a, "infos"_a)
        .def("exchange",
             [](Policy& p, nb::handle victims, nb::handle blocks, nb::handle keys, nb::handle infos) {
                 const std::vector<int64_t> leaving = blocks_of(victims);
                 const Run run(blocks, keys, infos, p.fields());
                 p.exchange(leaving, run.blocks, run.keys, run.infos);
             },
             "victims"_a, "blocks"_a, "keys"_a, "infos"_a)
        .def("admit",
             [](Policy& p, nb::handle blocks, nb::handle keys, nb::handle infos) {
                 const Run run(blocks, keys, infos, p.fields());
                 p.admit(run.blocks, run.keys, run.infos);
             },
             "blocks"_a, "keys"_a, "infos"_a)
        .def("evict_run", [](Policy& p, nb::handle blocks) { return p.evict_run(blocks_of(blocks)); }, "blocks"_a)
        .def("resize", [](Policy& p, nb::handle capacity) { p.resize(integer_of(capacity, "a capacity")); }, "capacity"_a);
    m.def("policy_names", &policy_names);
    m.def("gittins_constants", &constants_of_gittins);
}

}  // namespace pagemill
