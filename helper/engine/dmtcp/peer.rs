//! Whose process is at the other end of a TCP connection on this host, and what it has not read.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;

/// Offsets of `idiag_rqueue` and `idiag_uid` in an answer: `struct nlmsghdr`, then `struct
/// inet_diag_msg`.
const UNREAD: usize = 16 + 4 + 48 + 4;
const UID: usize = 16 + 4 + 48 + 12;

/// A socket on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Who owns it.
    pub uid: u32,
    /// Bytes that have come and that nobody has read.
    pub unread: u32,
}

/// The socket that is bound to `peer` and connected to `own`, or nothing if there is none on this
/// host (any more). Asks the kernel for this one socket (sock_diag(7)): `/proc/net/tcp` would be
/// read in full for every process that an application starts.
pub fn find(peer: SocketAddrV4, own: SocketAddrV4) -> io::Result<Option<Peer>> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    let mut request = Vec::with_capacity(72);
    // struct nlmsghdr
    request.extend_from_slice(&72_u32.to_ne_bytes());
    request.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // struct inet_diag_req_v2: family, protocol, extensions, padding, states
    request.extend_from_slice(&[libc::AF_INET as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    // struct inet_diag_sockid: ports and addresses in network order, any interface, any cookie
    request.extend_from_slice(&peer.port().to_be_bytes());
    request.extend_from_slice(&own.port().to_be_bytes());
    for address in [peer.ip(), own.ip()] {
        request.extend_from_slice(&address.octets());
        request.extend_from_slice(&[0; 12]);
    }
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&[0xff; 8]);
    let kernel = NetlinkAddr::new(0, 0);
    sendto(netlink.as_raw_fd(), &request, &kernel, MsgFlags::empty())?;

    let mut answer = [0; 1024];
    let count = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = &answer[..count];
    match answer.get(4..6) {
        Some(kind) if kind == BY_FAMILY.to_ne_bytes() => {
            match (number(answer, UID), number(answer, UNREAD)) {
                (Some(uid), Some(unread)) => Ok(Some(Peer { uid, unread })),
                _ => Err(io::ErrorKind::InvalidData.into()),
            }
        }
        Some(kind) if kind == NLMSG_ERROR.to_ne_bytes() => match answer.get(16..20) {
            Some(&[a, b, c, d]) => {
                match Errno::from_raw(i32::from_ne_bytes([a, b, c, d]).saturating_neg()) {
                    Errno::ENOENT => Ok(None),
                    errno => Err(errno.into()),
                }
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        },
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn number(answer: &[u8], at: usize) -> Option<u32> {
    let bytes = answer.get(at..at + 4)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};

    fn v4(address: SocketAddr) -> SocketAddrV4 {
        match address {
            SocketAddr::V4(address) => address,
            SocketAddr::V6(_) => panic!("IPv6"),
        }
    }

    #[test]
    fn own_connection_is_own() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut accepted, peer) = listener.accept().unwrap();
        let own = v4(listener.local_addr().unwrap());
        let me = nix::unistd::getuid().as_raw();
        let found = |unread| Some(Peer { uid: me, unread });
        assert_eq!(found(0), find(v4(peer), own).unwrap());
        accepted.write_all(b"12345").unwrap();
        assert_eq!(found(5), find(v4(peer), own).unwrap());
        stream.read_exact(&mut [0; 3]).unwrap();
        assert_eq!(found(2), find(v4(peer), own).unwrap());
        drop(stream);
        let nobody = SocketAddrV4::new([127, 0, 0, 1].into(), 1);
        assert_eq!(None, find(nobody, own).unwrap());
    }
}
