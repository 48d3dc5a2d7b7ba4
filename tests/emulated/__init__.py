"""The kernels on the CPU: their very sources against a host twin of ``kernels_cu/arch``."""
