# Variables of NCCL and HCCL for runs on several nodes. Copy the lines that you need into the file
# that the shell of every node reads, because --agent starts a shell there. None of them is needed
# where each node has one network. docs/environment.md has the time-outs.

# NCCL (NVIDIA)
export NCCL_SOCKET_IFNAME=eth0  # the network interface for its start and for TCP; a prefix is enough
export NCCL_DEBUG=WARN          # INFO prints the interface, the devices and the transport that it took
# export NCCL_IB_DISABLE=1      # TCP in place of InfiniBand and RoCE, to find out whether they are at fault

# HCCL (Ascend)
export HCCL_SOCKET_IFNAME=eth0  # the network interface of the host through which ranks find each other
# export HCCL_IF_IP=10.0.0.1    # in its place: the address of the host; it differs from node to node
export HCCL_CONNECT_TIMEOUT=120 # seconds in which all ranks must connect
export HCCL_EXEC_TIMEOUT=1836   # seconds that a collective waits for the other ranks
